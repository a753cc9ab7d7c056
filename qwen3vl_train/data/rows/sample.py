"""One row of data -> one checked `Sample`. Knows shapes of rows; knows no template, no token, no pixel."""

import json
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.image import ImageSource
from qwen3vl_train.data.media.remote import Remote

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "role", "content", "loss", "loss_weight", "name", "tool_calls", "tool_call_id", "reasoning_content",
}  # fmt: skip
_MAX_NESTING = 64  # far above any tool description, far below what makes Python's recursion fail
_PART_KINDS = ("text", "image", "image_url", "video")
_TIME_KEYS = ("fps", "sample_fps", "timestamps")
MAX_FPS = 1000


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: ImageSource


@dataclass(frozen=True)
class VideoPart:
    """A clip: a video file (path, data URI or bytes), or frames in files of their own with fps or timestamps.

    fps: of the list of frames as a whole clip, from which frames are then sampled as from a video file. timestamps:
    seconds of frames that were sampled before; all of them are taken. Both None for a file, whose header has its rate.
    """

    video: str | bytes | Remote | tuple[ImageSource, ...]
    fps: float | None = None
    timestamps: tuple[float, ...] | None = None


Part = TextPart | ImagePart | VideoPart


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
    """A conversation. sample_id names it in messages, like `train.jsonl:17`; media_root bounds its media paths.

    shape: the form its row was written in, a key of `rows.SHAPES`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    sample_id: str = "sample"
    media_root: str | None = None
    shape: str = "openai"


def parse_sample(row: Any, sample_id: str = "sample", media_root: str | None = None) -> Sample:
    """Turn `{"messages": [...], "tools": [...]}` into a Sample; other keys of the row are left alone. Raises RowFault.

    Keys that hold None count as absent, as columns of typed files fill them in. The answer may be missing.
    """
    if not isinstance(row, dict):
        raise RowFault(f'row is {_kind(row)}, not an object; write {{"messages": [...]}}', kind="wrong_type")
    messages = row.get("messages")
    if messages is None:
        raise RowFault('no messages; write {"messages": [{"role": ..., "content": ...}, ...]}', kind="missing_field")
    if not isinstance(messages, list):
        raise RowFault(f"messages is {_kind(messages)}, not a list; write a list of messages", kind="wrong_type")
    if not messages:
        raise RowFault("messages is empty; write at least a question and an answer", kind="missing_field")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("tools is not a list of objects; write OpenAI function descriptions", kind="wrong_type")
    _check_json(tools, "tools")
    parsed = tuple(_message(message, f"messages[{place}]") for place, message in enumerate(messages))
    return Sample(parsed, tuple(tools), sample_id, media_root)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowFault(f"{where} is {_kind(text)}, not a string; write text", kind="wrong_type")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{where} holds half a surrogate pair; write whole characters") from None
    return text


def _check_json(value: Any, where: str) -> None:
    """Refuse what the template cannot write out as JSON: dates or bytes of typed columns, towers of brackets."""
    level, depth = [value], 0
    while level and depth < _MAX_NESTING:
        level, depth = [inner for item in level for inner in _children(item)], depth + 1
    if level:
        raise RowFault(f"{where} is nested more than {_MAX_NESTING} deep; write it flatter")
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise RowFault(
            f"{where} cannot be written as JSON ({error}); write text and numbers", kind="wrong_type"
        ) from None
    _check_text(text, where)


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"{where} is {_kind(message)}, not an object; write role and content", kind="wrong_type")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(str(key) for key in message.keys() - _MESSAGE_KEYS)
    if unknown:
        raise RowFault(
            f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(_MESSAGE_KEYS))}",
            kind="unknown_field",
        )
    role = message.get("role")
    if role is None:
        raise RowFault(f"{where}: no role; write one of {', '.join(ROLES)}", kind="missing_field")
    if role not in ROLES:
        raise RowFault(f"{where}: unknown role {role!r}; use {', '.join(ROLES)}")
    tool_calls = _tool_calls(message.get("tool_calls", []), role, where)
    if "content" not in message and not tool_calls:
        raise RowFault(f"{where}: no content; write text or a list of parts", kind="missing_field")
    content = _content(message.get("content", ""), where)
    medium = next((part for part in content if not isinstance(part, TextPart)), None)
    if role in ("system", "assistant") and medium is not None:
        kind = "an image" if isinstance(medium, ImagePart) else "a video"
        raise RowFault(
            f"{where}: the {role} message has {kind}, which the template drops; move it to a user message",
            kind="dropped_by_template",
        )
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        _check_text(reasoning, f"{where}.reasoning_content")
        if role != "assistant":
            raise RowFault(f"{where}: reasoning_content in a {role} message; only assistant messages have it")
    return Message(role, content, _loss_weight(message, role, where), tool_calls, reasoning)


def _loss_weight(message: dict[str, Any], role: str, where: str) -> float:
    loss, weight = message.get("loss"), message.get("loss_weight")
    if loss is not None and not isinstance(loss, bool):
        raise RowFault(f"{where}.loss is {_kind(loss)}; write true or false", kind="wrong_type")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RowFault(f"{where}.loss_weight is {_kind(weight)}; write a number of at least 0", kind="wrong_type")
        if not (math.isfinite(weight) and weight >= 0):
            raise RowFault(f"{where}.loss_weight is {weight}; write a finite number of at least 0")
    if role != "assistant":
        if loss or weight:
            raise RowFault(f"{where}: loss on a {role} message; only assistant messages are trained")
        return 0.0
    if loss is False:
        if weight:
            raise RowFault(
                f"{where}: loss is false but loss_weight is {weight}; take one of them out", kind="conflicting_fields"
            )
        return 0.0
    return 1.0 if weight is None else float(weight)


def _tool_calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise RowFault(f"{where}: tool_calls in a {role} message; only assistant messages call tools")
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls is {_kind(calls)}, not a list; write a list of calls", kind="wrong_type")
    parsed = []
    for place, call in enumerate(calls):
        here = f"{where}.tool_calls[{place}]"
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise RowFault(
                f'{here}: no name and arguments; write {{"name": ..., "arguments": {{...}}}}', kind="missing_field"
            )
        arguments = call["arguments"]
        if isinstance(arguments, str):
            _check_text(arguments, here)
        else:
            _check_json(arguments, here)
        parsed.append(ToolCall(_check_text(call["name"], f"{here}.name"), arguments))
    return tuple(parsed)


def _content(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(_check_text(content, f"{where}.content")),) if content else ()
    if not isinstance(content, list):
        raise RowFault(f"{where}.content is {_kind(content)}; write text or a list of parts", kind="wrong_type")
    return tuple(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    """Read {"type": "text", "text": ...}, image, video or OpenAI's image_url alike; type may be absent."""
    if not isinstance(part, dict):
        raise RowFault(
            f'{where} is {_kind(part)}, not an object; write {{"type": "text", "text": ...}}', kind="wrong_type"
        )
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.pop("type", None)
    if kind is None:
        kind = next((key for key in _PART_KINDS if key in part), None)
    if kind not in _PART_KINDS:
        what = "no type" if kind is None else f"unknown content type {kind!r}"
        raise RowFault(f"{where}: {what}; use text, image or video")
    if kind not in part:
        raise RowFault(
            f'{where}: no key {kind!r} beside type {kind!r}; write {{"type": "{kind}", "{kind}": ...}}',
            kind="missing_field",
        )
    value = part.pop(kind)
    if kind == "video" and isinstance(value, dict) and "frames" in value:
        value, part = _unfolded(value, part, where)
    times = {key: part.pop(key) for key in _TIME_KEYS if key in part} if kind == "video" else {}
    if part:
        raise RowFault(
            f"{where}: unknown key {', '.join(sorted(map(str, part)))} in a part of type {kind}; take it out",
            kind="unknown_field",
        )
    if kind == "text":
        return TextPart(_check_text(value, f"{where}.text"))
    if kind == "video":
        return _video(_of_struct(value), times, where)
    if kind == "image_url" and isinstance(value, dict):
        value = value.get("url")
    return ImagePart(_image(value, f"{where}.{kind}"))


def _unfolded(clip: dict[str, Any], beside: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return frames, and what is said of them in their object or beside it."""
    said = {key: value for key, value in clip.items() if value is not None}
    frames = said.pop("frames", None)
    if not isinstance(frames, list | tuple):
        raise RowFault(
            f"{where}.video.frames is {_kind(frames)}, not a list; write a list of images", kind="wrong_type"
        )
    twice = sorted(said.keys() & beside.keys())
    if twice:
        raise RowFault(
            f"{where}: {', '.join(twice)} in the video and beside it; keep one of them", kind="conflicting_fields"
        )
    return frames, said | beside


def _image(value: Any, where: str) -> ImageSource:
    value = _of_struct(value)
    if isinstance(value, str):
        return _check_text(value, where)
    if isinstance(value, bytes | Image.Image):
        return value
    raise RowFault(f"{where} is {_kind(value)}; write a path, a data URI, bytes or a PIL image", kind="wrong_type")


def _video(value: Any, times: dict[str, Any], where: str) -> VideoPart:
    """Read a video file, or a list of frames with exactly one of fps, sample_fps (already sampled) and timestamps.

    The frames may stand in an object with it, {"frames": [...], "fps": 2}, which `_part` has taken apart.

    sample_fps 2 of three frames -> timestamps 0.0, 0.5, 1.0
    """
    if isinstance(value, str | bytes):
        if times:
            raise RowFault(
                f"{where}: {', '.join(times)} beside a video file, whose header says it; take it out",
                kind="conflicting_fields",
            )
        return VideoPart(_check_text(value, f"{where}.video") if isinstance(value, str) else value)
    if not isinstance(value, list | tuple):
        raise RowFault(
            f"{where}.video is {_kind(value)}; write a path, a data URI, bytes or a list of frames", kind="wrong_type"
        )
    frames = tuple(_image(frame, f"{where}.video[{place}]") for place, frame in enumerate(value))
    if len(frames) < 2:
        raise RowFault(f"{where}.video: {len(frames)} frames, a clip needs 2; add frames or give an image")
    if len(times) != 1:
        found = " and ".join(times) or "no times"
        raise RowFault(
            f"{where}: a list of frames with {found}; give one of {', '.join(_TIME_KEYS)}, as in "
            '{"frames": [...], "fps": 2}',
            kind="conflicting_fields" if times else "no_frame_rate",
        )
    ((key, given),) = times.items()
    if key == "timestamps":
        return VideoPart(frames, timestamps=_timestamps(given, len(frames), f"{where}.timestamps"))
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= MAX_FPS:
        raise RowFault(
            f"{where}.{key} is {given!r}; write a number of frames a second, above 0 and at most {MAX_FPS}",
            kind="no_frame_rate",
        )
    if key == "fps":
        return VideoPart(frames, fps=float(given))
    return VideoPart(frames, timestamps=tuple(place / given for place in range(len(frames))))


def _timestamps(times: Any, num_frames: int, where: str) -> tuple[float, ...]:
    if not isinstance(times, list | tuple):
        raise RowFault(f"{where} is {_kind(times)}; write a list of seconds, one for each frame", kind="wrong_type")
    if len(times) != num_frames:
        raise RowFault(f"{where}: {len(times)} times for {num_frames} frames; give one for each frame")
    last = 0.0
    for place, time in enumerate(times):
        number = not isinstance(time, bool) and isinstance(time, int | float)
        if not number or not (math.isfinite(time) and time >= last):
            raise RowFault(f"{where}[{place}] is {time!r}; write seconds from 0 on that never go back")
        last = float(time)
    return tuple(float(time) for time in times)


def _of_struct(value: Any) -> Any:
    """Return what a {"bytes": ..., "path": ...} struct of a typed file stands for: its bytes, else its path."""
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value
