"""One row of data -> one checked `Sample`. Knows shapes of rows; knows no template, no token, no pixel."""

import json
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.media import ImageSource

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "role", "content", "loss", "loss_weight", "name", "tool_calls", "tool_call_id", "reasoning_content",
}  # fmt: skip


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: ImageSource


Part = TextPart | ImagePart


@dataclass(frozen=True)
class ToolCall:
    """arguments: a string is rendered as it is, anything else as JSON."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """One turn. loss_weight: 0 where the turn is not trained; only assistant turns have another. reasoning: or None."""

    role: str
    content: tuple[Part, ...]
    loss_weight: float = 0.0
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts, joined; media leave nothing."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


@dataclass(frozen=True)
class Sample:
    """A conversation. sample_id names it in messages, like `train.jsonl:17`; media_root bounds its media paths."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    sample_id: str = "sample"
    media_root: str | None = None


def parse_row(text: str, sample_id: str, media_root: str | None) -> Sample:
    """Turn a line of JSON in OpenAI messages form into a Sample that has something to learn. Raises RowFault."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowFault(f"not JSON ({reason}); write one object a line") from None
    sample = parse_sample(row, sample_id, media_root)
    if not any(message.loss_weight > 0 for message in sample.messages):
        raise RowFault("nothing to learn: no assistant message is trained; add an answer or take out loss: false")
    return sample


def parse_sample(row: Any, sample_id: str = "sample", media_root: str | None = None) -> Sample:
    """Turn `{"messages": [...], "tools": [...]}` into a Sample; other keys of the row are left alone. Raises RowFault.

    Keys that hold None count as absent, as columns of typed files fill them in. The answer may be missing.
    """
    if not isinstance(row, dict):
        raise RowFault(f'row is {_kind(row)}, not an object; write {{"messages": [...]}}')
    messages = row.get("messages")
    if messages is None:
        raise RowFault('no messages; write {"messages": [{"role": ..., "content": ...}, ...]}')
    if not isinstance(messages, list):
        raise RowFault(f"messages is {_kind(messages)}, not a list; write a list of messages")
    if not messages:
        raise RowFault("messages is empty; write at least a question and an answer")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("tools is not a list of objects; write OpenAI function descriptions")
    _check_text(json.dumps(tools, ensure_ascii=False), "tools")
    parsed = tuple(_message(message, f"messages[{place}]") for place, message in enumerate(messages))
    return Sample(parsed, tuple(tools), sample_id, media_root)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowFault(f"{where} is {_kind(text)}, not a string; write text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{where} holds half a surrogate pair; write whole characters") from None
    return text


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"{where} is {_kind(message)}, not an object; write role and content")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(str(key) for key in message.keys() - _MESSAGE_KEYS)
    if unknown:
        raise RowFault(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(_MESSAGE_KEYS))}")
    role = message.get("role")
    if role is None:
        raise RowFault(f"{where}: no role; write one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise RowFault(f"{where}: unknown role {role!r}; use {', '.join(ROLES)}")
    tool_calls = _tool_calls(message.get("tool_calls", []), role, where)
    if "content" not in message and not tool_calls:
        raise RowFault(f"{where}: no content; write text or a list of parts")
    content = _content(message.get("content", ""), where)
    if role in ("system", "assistant") and any(not isinstance(part, TextPart) for part in content):
        raise RowFault(f"{where}: the {role} message has an image, which the template drops; move it to a user message")
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        _check_text(reasoning, f"{where}.reasoning_content")
        if role != "assistant":
            raise RowFault(f"{where}: reasoning_content in a {role} message; only assistant messages have it")
    return Message(role, content, _loss_weight(message, role, where), tool_calls, reasoning)


def _loss_weight(message: dict[str, Any], role: str, where: str) -> float:
    loss, weight = message.get("loss"), message.get("loss_weight")
    if loss is not None and not isinstance(loss, bool):
        raise RowFault(f"{where}.loss is {_kind(loss)}; write true or false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RowFault(f"{where}.loss_weight is {_kind(weight)}; write a number of at least 0")
        if not (math.isfinite(weight) and weight >= 0):
            raise RowFault(f"{where}.loss_weight is {weight}; write a finite number of at least 0")
    if role != "assistant":
        if loss or weight:
            raise RowFault(f"{where}: loss on a {role} message; only assistant messages are trained")
        return 0.0
    if loss is False:
        if weight:
            raise RowFault(f"{where}: loss is false but loss_weight is {weight}; take one of them out")
        return 0.0
    return 1.0 if weight is None else float(weight)


def _tool_calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise RowFault(f"{where}: tool_calls in a {role} message; only assistant messages call tools")
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls is {_kind(calls)}, not a list; write a list of calls")
    parsed = []
    for place, call in enumerate(calls):
        here = f"{where}.tool_calls[{place}]"
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise RowFault(f'{here}: no name and arguments; write {{"name": ..., "arguments": {{...}}}}')
        arguments = call["arguments"]
        _check_text(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False), here)
        parsed.append(ToolCall(_check_text(call["name"], f"{here}.name"), arguments))
    return tuple(parsed)


def _content(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(_check_text(content, f"{where}.content")),) if content else ()
    if not isinstance(content, list):
        raise RowFault(f"{where}.content is {_kind(content)}; write text or a list of parts")
    return tuple(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    """Read {"type": "text", "text": ...}, {"type": "image", "image": ...} or OpenAI's image_url; type may be absent."""
    if not isinstance(part, dict):
        raise RowFault(f'{where} is {_kind(part)}, not an object; write {{"type": "text", "text": ...}}')
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.pop("type", None)
    if kind is None:
        kind = next((key for key in ("text", "image", "image_url") if key in part), None)
    if kind not in ("text", "image", "image_url"):
        what = "no type" if kind is None else f"unknown content type {kind!r}"
        raise RowFault(f"{where}: {what}; use text or image")
    if kind not in part:
        raise RowFault(f'{where}: no key {kind!r} beside type {kind!r}; write {{"type": "{kind}", "{kind}": ...}}')
    value = part.pop(kind)
    if part:
        raise RowFault(
            f"{where}: unknown key {', '.join(sorted(map(str, part)))} in a part of type {kind}; take it out"
        )
    if kind == "text":
        return TextPart(_check_text(value, f"{where}.text"))
    if kind == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if isinstance(value, str):
        return ImagePart(_check_text(value, f"{where}.{kind}"))
    if isinstance(value, bytes | Image.Image):
        return ImagePart(value)
    raise RowFault(f"{where}.{kind} is {_kind(value)}; write a path, a data URI, bytes or a PIL image")
