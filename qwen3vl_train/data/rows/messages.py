"""Check the OpenAI messages of one row and return them as a `Sample`."""

import json
import sys
from typing import Any

from PIL import Image

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.clips import MAX_FPS
from qwen3vl_train.data.media.paths import ImageInput
from qwen3vl_train.data.rows.sample import ROLES, ImagePart, Message, Part, Sample, TextPart, ToolCall, VideoPart

_KEYS = {"role", "content", "loss", "loss_weight", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_MAX_NESTING = 64  # far above any tool description, far below Python's recursion limit
_PART_TYPES = ("text", "image", "image_url", "video")
_TIME_KEYS = ("fps", "sample_fps", "timestamps")


def parse_sample(
    row: Any, sample_id: str = "sample", media_root: str | None = None, row_format: str = "openai"
) -> Sample:
    """Turn `{"messages": [...], "tools": [...]}` into a Sample; other keys of the row are ignored. Raise RowFault.

    Keys that hold None count as absent: columns of typed files are filled with it. The answer may be missing.
    """
    if not isinstance(row, dict):
        raise _wrong_type("row", row, ', not an object; write {"messages": [...]}')
    messages = row.get("messages")
    if messages is None:
        fault = 'no messages; write {"messages": [{"role": ..., "content": ...}, ...]}'
        raise RowFault(fault, kind="missing_field")
    if not isinstance(messages, list):
        raise _wrong_type("messages", messages, ", not a list; write a list of messages")
    if not messages:
        raise RowFault("messages is empty; write at least a question and an answer", kind="missing_field")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("tools is not a list of objects; write OpenAI function descriptions", kind="wrong_type")
    _check_json(tools, "tools")
    parsed = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    return Sample(parsed, tuple(tools), sample_id, media_root, row_format)


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def to_json(value: Any) -> str:
    """Write tools and the arguments of calls as the chat template does."""
    return json.dumps(value, ensure_ascii=False)


def _wrong_type(where: str, value: Any, rest: str) -> RowFault:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    found = names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
    return RowFault(f"{where} is {found}{rest}", kind="wrong_type")


def _check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise _wrong_type(where, text, ", not a string; write text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{where} contains half a surrogate pair; write whole characters") from None
    return text


def _check_json(value: Any, where: str) -> None:
    """Reject what the template cannot write as JSON: dates or bytes of typed columns, deeply nested brackets."""
    level = [value]
    for _ in range(_MAX_NESTING):
        brackets = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in brackets for inner in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise RowFault(f"{where} is nested more than {_MAX_NESTING} deep; flatten it")
    try:
        text = to_json(value)
    except TypeError as error:
        fault = f"{where} cannot be written as JSON ({error}); write text and numbers"
        raise RowFault(fault, kind="wrong_type") from None
    _check_text(text, where)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong_type(where, message, ", not an object; write role and content")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(str(key) for key in message.keys() - _KEYS)
    if unknown:
        fault = f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}"
        raise RowFault(fault, kind="unknown_field")
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
        what = "an image" if isinstance(medium, ImagePart) else "a video"
        fault = f"{where}: the {role} message has {what}, which the template drops; move it to a user message"
        raise RowFault(fault, kind="dropped_by_template")
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        _check_text(reasoning, f"{where}.reasoning_content")
        if role != "assistant":
            raise RowFault(f"{where}: reasoning_content in a {role} message; only assistant messages have it")
    return Message(role, content, _loss_weight(message, role, where), tool_calls, reasoning)


def _loss_weight(message: dict[str, Any], role: str, where: str) -> float:
    loss, weight = message.get("loss"), message.get("loss_weight")
    if loss is not None and not isinstance(loss, bool):
        raise _wrong_type(f"{where}.loss", loss, "; write true or false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise _wrong_type(f"{where}.loss_weight", weight, "; write a number of at least 0")
        if not is_number(weight) or weight < 0:
            raise RowFault(f"{where}.loss_weight is {weight}; write a finite number of at least 0")
    if role != "assistant" and (loss or weight):
        raise RowFault(f"{where}: loss on a {role} message; only assistant messages are trained")
    if loss is False and weight:
        fault = f"{where}: loss is false but loss_weight is {weight}; remove one of them"
        raise RowFault(fault, kind="conflicting_fields")
    if role != "assistant" or loss is False:
        return 0.0
    return 1.0 if weight is None else float(weight)


def _tool_calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise RowFault(f"{where}: tool_calls in a {role} message; only assistant messages call tools")
    if not isinstance(calls, list):
        raise _wrong_type(f"{where}.tool_calls", calls, ", not a list; write a list of calls")
    parsed = []
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            fault = f'{here}: no name and arguments; write {{"name": ..., "arguments": {{...}}}}'
            raise RowFault(fault, kind="missing_field")
        _check_json(call["arguments"], here)
        parsed.append(ToolCall(_check_text(call["name"], f"{here}.name"), call["arguments"]))
    return tuple(parsed)


def _content(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(_check_text(content, f"{where}.content")),) if content else ()
    if not isinstance(content, list):
        raise _wrong_type(f"{where}.content", content, "; write text or a list of parts")
    return tuple(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    """Parse {"type": "text", "text": ...}, or the same with image, video or OpenAI's image_url; type may be absent."""
    if not isinstance(part, dict):
        raise _wrong_type(where, part, ', not an object; write {"type": "text", "text": ...}')
    part = {key: value for key, value in part.items() if value is not None}
    part_type = part.pop("type", next((key for key in _PART_TYPES if key in part), None))
    if part_type not in _PART_TYPES:
        what = "no type" if part_type is None else f"unknown content type {part_type!r}"
        raise RowFault(f"{where}: {what}; use text, image or video")
    if part_type not in part:
        example = f'{{"type": "{part_type}", "{part_type}": ...}}'
        raise RowFault(f"{where}: no key {part_type!r} for type {part_type!r}; write {example}", kind="missing_field")
    value = part.pop(part_type)
    if part_type == "video" and isinstance(value, dict) and "frames" in value:
        value, part = _unpack_frames(value, part, where)
    times = {key: part.pop(key) for key in _TIME_KEYS if key in part} if part_type == "video" else {}
    if part:
        fault = f"{where}: unknown key {', '.join(sorted(map(str, part)))} in a part of type {part_type}; remove it"
        raise RowFault(fault, kind="unknown_field")
    if part_type == "text":
        return TextPart(_check_text(value, f"{where}.text"))
    if part_type == "video":
        return _video(_bytes_or_path(value), times, where)
    if part_type == "image_url" and isinstance(value, dict):
        value = value.get("url")
    return ImagePart(_image(value, f"{where}.{part_type}"))


def _unpack_frames(clip: dict[str, Any], other: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return the frames of {"frames": [...], ...}, and the other keys in this object and next to it."""
    inner = {key: value for key, value in clip.items() if value is not None}
    frames = inner.pop("frames", None)
    if not isinstance(frames, list | tuple):
        raise _wrong_type(f"{where}.video.frames", frames, ", not a list; write a list of images")
    both = sorted(inner.keys() & other.keys())
    if both:
        fault = f"{where}: {', '.join(both)} both in the video and next to it; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    return frames, inner | other


def _image(value: Any, where: str) -> ImageInput:
    value = _bytes_or_path(value)
    if isinstance(value, str):
        return _check_text(value, where)
    if isinstance(value, bytes | Image.Image):
        return value
    raise _wrong_type(where, value, "; write a path, a data URI, bytes or a PIL image")


def _video(value: Any, times: dict[str, Any], where: str) -> VideoPart:
    """Parse a video file, or a list of frames with exactly one of fps, sample_fps (already sampled) and timestamps.

    sample_fps 2 of three frames -> timestamps 0.0, 0.5, 1.0
    """
    if isinstance(value, str | bytes):
        if times:
            fault = f"{where}: {', '.join(times)} next to a video file, whose header has the times; remove it"
            raise RowFault(fault, kind="conflicting_fields")
        return VideoPart(_check_text(value, f"{where}.video") if isinstance(value, str) else value)
    if not isinstance(value, list | tuple):
        raise _wrong_type(f"{where}.video", value, "; write a path, a data URI, bytes or a list of frames")
    frames = tuple(_image(frame, f"{where}.video[{index}]") for index, frame in enumerate(value))
    if len(frames) < 2:
        raise RowFault(f"{where}.video: {len(frames)} frames, a clip needs 2; add frames or give an image")
    if len(times) != 1:
        raise RowFault(
            f"{where}: a list of frames with {' and '.join(times) or 'no times'}; give one of {', '.join(_TIME_KEYS)}, "
            'as in {"frames": [...], "fps": 2}',
            kind="conflicting_fields" if times else "no_frame_rate",
        )
    ((key, given),) = times.items()
    if key == "timestamps":
        return VideoPart(frames, timestamps=_timestamps(given, len(frames), f"{where}.timestamps"))
    if not is_number(given) or not 0 < given <= MAX_FPS:
        fault = f"{where}.{key} is {given!r}; write a number of frames per second, above 0 and at most {MAX_FPS}"
        raise RowFault(fault, kind="no_frame_rate")
    if key == "fps":
        return VideoPart(frames, fps=float(given))
    return VideoPart(frames, timestamps=tuple(index / given for index in range(len(frames))))


def _timestamps(times: Any, num_frames: int, where: str) -> tuple[float, ...]:
    if not isinstance(times, list | tuple):
        raise _wrong_type(where, times, "; write a list of seconds, one for each frame")
    if len(times) != num_frames:
        raise RowFault(f"{where}: {len(times)} times for {num_frames} frames; give one for each frame")
    last = 0.0
    for index, time in enumerate(times):
        if not is_number(time) or time < last:
            raise RowFault(f"{where}[{index}] is {time!r}; write seconds, at least 0, that never decrease")
        last = float(time)
    return tuple(map(float, times))


def _bytes_or_path(value: Any) -> Any:
    """Return the bytes, or else the path, of a {"bytes": ..., "path": ...} struct of a typed file."""
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value
