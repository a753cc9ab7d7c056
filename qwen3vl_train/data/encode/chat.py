"""Qwen3-VL's chat template as Python rules, so that every character is known to be trained or not.

A dialect renders messages as pieces. Special tokens are pieces of their own and never text, so nothing that a user
types can become one. `template.py` checks that a dialect renders what the checkpoint's own template renders.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qwen3vl_train.data.encode.tokenizer import IMAGE_PAD, TURN_END, TURN_START, VIDEO_PAD, VISION_END, VISION_START
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.sample import ImagePart, Message, TextPart, VideoPart
from qwen3vl_train.data.rows.values import to_json


class Special(NamedTuple):
    """One special token, by name. weight: its loss weight, 0 where it is not trained."""

    name: str
    weight: float = 0.0


class Text(NamedTuple):
    """Plain text. Adjacent texts are tokenised together. weight: its loss weight, 0 where it is not trained."""

    text: str
    weight: float = 0.0


class Slot(NamedTuple):
    """The slot of a medium, to be replaced by `vision_markup`. where: its position, `messages[0].content[1]`."""

    part: ImagePart | VideoPart
    where: str


class Pad(NamedTuple):
    """`count` placeholder tokens that features of the vision tower will fill."""

    name: str
    count: int


Piece = Special | Text | Slot | Pad
Dialect = Callable[..., list[Piece]]
"""(messages, tools, *, generation_prompt) -> pieces. Raise RowFault for what the template would drop silently."""

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_FOOT = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def vision_markup(slot: Slot, num_tokens: int, times: Sequence[float] = (), *, wrapped: bool = False) -> list[Piece]:
    """Return the pieces of a medium.

    A clip reads `<0.3 seconds>`, then its first frame pair between vision start and end like an image, and so on.

    num_tokens: placeholder tokens of an image, or of each frame pair of a clip.
    times: seconds of the frame pairs.
    wrapped: put vision start and end around the whole clip too, as transformers 5.10 to 5.23 does; 4.57 to 5.9 and
        Qwen's own code do not.
    """
    if isinstance(slot.part, ImagePart):
        return [Special(VISION_START), Pad(IMAGE_PAD, num_tokens), Special(VISION_END)]
    start, end, frames = Special(VISION_START), Special(VISION_END), Pad(VIDEO_PAD, num_tokens)
    pieces: list[Piece] = [piece for time in times for piece in (Text(f"<{time:.1f} seconds>"), start, frames, end)]
    return [start, *pieces, end] if wrapped else pieces


def as_text(pieces: Sequence[Piece]) -> str:
    """Return the text that the checkpoint's template renders, with one placeholder for an image or clip."""
    words = []
    for piece in pieces:
        if isinstance(piece, Slot):
            pad = IMAGE_PAD if isinstance(piece.part, ImagePart) else VIDEO_PAD
            words.append(VISION_START + pad + VISION_END)
        elif isinstance(piece, Pad):
            words.append(piece.name * piece.count)
        else:
            words.append(piece.text if isinstance(piece, Text) else piece.name)
    return "".join(words)


def _content(message: Message, index: int) -> list[Piece]:
    return [
        Text(part.text) if isinstance(part, TextPart) else Slot(part, f"messages[{index}].content[{part_index}]")
        for part_index, part in enumerate(message.content)
    ]


def _calls(message: Message, has_content: bool) -> str:
    """Render the tool calls of an assistant message as the text that follows its content."""
    words = [""] if has_content and message.tool_calls else []
    for call in message.tool_calls:
        arguments = call.arguments if isinstance(call.arguments, str) else to_json(call.arguments)
        words.append(f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(words)


def _system(messages: Sequence[Message], tools: Sequence[Any]) -> list[Piece]:
    """Render the first turn: the system message, the description of the tools, both, or nothing."""
    own = messages[0] if messages[0].role == "system" else None
    if own is None and not tools:
        return []
    text = own.text if own else ""
    if tools:
        gap = "\n\n" if own else ""
        text += gap + _TOOLS_HEAD + "".join("\n" + to_json(tool) for tool in tools) + _TOOLS_FOOT
    return _turn("system", [Text(text)])


def _turn(role: str, content: Sequence[Piece], end_weight: float = 0.0) -> list[Piece]:
    return [Special(TURN_START), Text(f"{role}\n"), *content, Special(TURN_END, end_weight), Text("\n")]


def _tool_results(messages: Sequence[Message], index: int) -> list[Piece]:
    """Render one tool message; the first of consecutive ones opens a user turn, the last closes it."""
    opens = index == 0 or messages[index - 1].role != "tool"
    closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
    return [
        *([Special(TURN_START), Text("user")] if opens else []),
        Text("\n<tool_response>\n"),
        *_content(messages[index], index),
        Text("\n</tool_response>"),
        *([Special(TURN_END), Text("\n")] if closes else []),
    ]


def render_instruct(
    messages: Sequence[Message], tools: Sequence[Any] = (), *, generation_prompt: bool = False
) -> list[Piece]:
    """Render as the Instruct checkpoints do. An answer is trained from its first character through `<|im_end|>`."""
    pieces = _system(messages, tools)
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            fault = "a system message that is not the first, which the template drops; move it to the front"
            raise RowFault(f"messages[{index}]: {fault}", kind="dropped_by_template")
        if message.reasoning is not None:
            raise RowFault(
                f"messages[{index}]: reasoning_content, which the template of an Instruct checkpoint drops; remove "
                "it or use a Thinking checkpoint",
                kind="dropped_by_template",
            )
        if message.role == "user":
            pieces += _turn("user", _content(message, index))
        elif message.role == "assistant":
            answer = message.text + _calls(message, bool(message.content))
            pieces += _turn("assistant", [Text(answer, message.loss_weight)], message.loss_weight)
        elif message.role == "tool":
            pieces += _tool_results(messages, index)
    if generation_prompt:
        pieces += [Special(TURN_START), Text("assistant\n")]
    return pieces


def render_thinking(
    messages: Sequence[Message], tools: Sequence[Any] = (), *, generation_prompt: bool = False
) -> list[Piece]:
    """Render as the Thinking checkpoints do: reasoning is kept only in answers after the user's last question.

    Generation always starts after `<think>\\n`, so only answers that have it are trained, from there through
    `<|im_end|>`; earlier answers have no reasoning, a state that the served model is never in.
    """
    pieces = _system(messages, tools)
    last_query = _last_query(messages)
    for index, message in enumerate(messages):
        if message.role == "user" or (message.role == "system" and index):
            pieces += _turn(message.role, _content(message, index))
        elif message.role == "assistant":
            reasoning, answer = _split_reasoning(message)
            calls = _calls(message, bool(answer))
            if index > last_query and (index + 1 == len(messages) or reasoning):
                thought = reasoning.strip("\n") + "\n</think>\n\n" + answer.lstrip("\n") + calls
                weight = message.loss_weight
                pieces += _turn("assistant", [Text("<think>\n"), Text(thought, weight)], weight)
            else:
                pieces += _turn("assistant", [Text(answer + calls)])
        elif message.role == "tool":
            pieces += _tool_results(messages, index)
    if generation_prompt:
        pieces += [Special(TURN_START), Text("assistant\n<think>\n")]
    return pieces


def _last_query(messages: Sequence[Message]) -> int:
    """Return the index of the last user message that is not a wrapped tool response, or else of the last message."""
    for index in range(len(messages) - 1, -1, -1):
        text = as_text(_content(messages[index], index))
        wrapped = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[index].role == "user" and not wrapped:
            return index
    return len(messages) - 1


def _split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, answer); reasoning is in its own field or between `<think>` tags in the text."""
    text = message.text
    if message.reasoning is not None:
        return message.reasoning, text
    if "</think>" not in text:
        return "", text
    before = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return before, text.split("</think>")[-1].lstrip("\n")


DIALECTS: dict[str, Dialect] = {"instruct": render_instruct, "thinking": render_thinking}
