"""One part of a message, or one medium that a row lists, in any dialect -> a checked `Part`.

{"type": "text" | "image" | "video", ...} with the medium under its own name (Qwen, transformers), under path, url or
base64 (transformers), image_url or video_url (OpenAI), value (Swift), or source (Anthropic).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.medium import OPTIONS, read_medium
from qwen3vl_train.data.rows.sample import Part, TextPart
from qwen3vl_train.data.rows.values import check_text, wrong_type

_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_VALUES = {
    "text": ("text", "value"),
    "image": ("image", "image_url", "path", "url", "base64", "value", "source"),
    "video": ("video", "video_url", "path", "url", "base64", "value", "source"),
}
_RECIPE_KEYS = {
    "total_pixels": "data.max_visual_tokens_per_video", "min_frames": "data.min_frames",
    "max_frames": "data.max_frames",
}  # fmt: skip
"""Keys of a part whose meaning the recipe has for all clips."""
_KNOWN = frozenset({*_VALUES["image"], *_VALUES["video"], "text", *OPTIONS["video"], *_RECIPE_KEYS,
                    "audio", "audio_url", "input_audio", "file", "file_id"})  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """A part without its medium, which the row lists elsewhere. options: what the part says about it."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


def read_part(part: Any, where: str, ignored: list[str]) -> Part | Slot:
    """Read one part. ignored: takes the keys that nothing reads, as "part.index". Raise RowFault."""
    if not isinstance(part, dict):
        raise wrong_type(where, part, ', not an object; write {"type": "text", "text": ...}')
    keys = Keys(part, where)
    named = keys.get("type")
    if named is None:
        named = next((key for key in _KINDS if keys.holds(key)), next((key for key in _KINDS if key in part), None))
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        what = "no type" if named is None else f"unknown content type {named!r}"
        raise RowFault(f"{where}: {what}; use text, image or video")
    value = keys.take(*_VALUES[kind])
    options = {name: found for name in OPTIONS[kind] if (found := keys.take(name)) is not None}
    for name, key in _RECIPE_KEYS.items():
        if kind == "video" and keys.take(name) is not None:
            fault = f"{where}: {name} of one clip is not supported; set {key} in the recipe, for all clips, instead"
            raise RowFault(fault, kind="unknown_field")
    ignored += [f"part.{key}" for key in keys.close(_KNOWN, f"a part of type {named}")]
    if kind == "text":
        return _text(part, value, where)
    if value is None:
        return Slot(kind, options)
    return read_medium(kind, value, options, where, ignored, named)


def _text(part: dict[str, Any], value: Any, where: str) -> TextPart:
    if value is None and not any(isinstance(part.get(key), str) for key in _VALUES["text"]):
        example = '{"type": "text", "text": ...}'
        raise RowFault(f"{where}: no key 'text' for type 'text'; write {example}", kind="missing_field")
    return TextPart(check_text("" if value is None else value, f"{where}.text"))


def is_part_list(text: str, only_text: bool) -> list[dict[str, Any]] | None:
    """Return the typed parts that a text is the JSON of, None for any other text.

    only_text: parts of other types do not count: an answer may itself be JSON about images.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = [_KINDS.get(part["type"]) if isinstance(part, dict) and isinstance(part.get("type"), str) else None
             for part in parts] if isinstance(parts, list) else []  # fmt: skip
    if not kinds or not all(kind == "text" if only_text else kind for kind in kinds):
        return None
    return parts
