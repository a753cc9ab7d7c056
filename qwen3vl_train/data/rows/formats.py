"""The formats of rows, and the names of their keys.

openai      {"messages": [{"role", "content"}]}, with media in typed parts, or listed separately under images and videos
sharegpt    {"conversations": [{"from", "value"}]}, media listed separately, `<image>` and `<video>` placeholders in the
            questions; LLaVA's JSON, and that of Qwen's own fine-tuning scripts with its data_path
texts       {"images", "texts": [{"user", "assistant"}]}: the_cauldron, FineVision, Docmatix
prompt      {"prompt", "completion"}, each a text or messages: TRL
columns     {"question", "answer", "image"}, or whatever the recipe's `columns` calls them; Alpaca's and Swift's names
"""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.marks import Mark, is_mark, split_marks
from qwen3vl_train.data.rows.medium import is_medium, is_picture_path
from qwen3vl_train.data.rows.placeholders import ListedMedia
from qwen3vl_train.data.rows.values import is_empty, parse_json

Row = dict[str, Any]
Columns = Mapping[str, str | Sequence[str]]
FORMATS = ("openai", "sharegpt", "texts", "prompt", "columns")
_ALIASES = {
    "question": ("question", "instruction", "query"), "answer": ("answer", "answers", "output", "response"),
    "image": ("image", "images"), "video": ("video", "videos"),
}  # fmt: skip
"""Names that a field has where `columns` does not name its column; of all others, its own."""
TURN_KEYS = {
    "openai": ("messages",), "sharegpt": ("conversations", "conversation", "messages"), "texts": ("texts",),
    "prompt": ("prompt", "completion"), "columns": (*_ALIASES["question"], *_ALIASES["answer"], "reasoning", "input",
                                                    "history"),
}  # fmt: skip
"""Keys from which a format takes its turns."""
_COMMON = ("system", "tools", "functions", *_ALIASES["image"], *_ALIASES["video"], "data_path", "objects", "boxes",
           "points", "audio", "audios", "chosen", "rejected", "rejected_response")  # fmt: skip
_OF_CLIP = ("sample_fps", "timestamps", "start", "end", "video_start", "video_end", "segment")
_KNOWN = {name: frozenset({*_COMMON, *keys}) for name, keys in TURN_KEYS.items()}
_KNOWN["auto"] = frozenset({*(key for keys in _KNOWN.values() for key in keys), "context", "choices", "options"})
_KNOWN["sharegpt"] = frozenset(_COMMON)  # one of its keys is read; where the format is given, the others are metadata
READ_COLUMNS = (*sorted(_KNOWN["auto"]), "bbox", "bbox_layout", "fps", *_OF_CLIP)
"""Every column that is read from typed files, unless `columns` renames it."""


def detect_format(row: Row, columns: Columns, texts: Collection[str] = ()) -> str:
    """Return the format of a row, a member of FORMATS. Raise RowFault when it has none of them.

    texts: fields whose text the recipe gives.
    """
    if not is_empty(messages := row.get("messages")) or isinstance(messages, list):
        first = messages[0] if isinstance(messages, list) and messages else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "openai"
    if any(row.get(key) is not None for key in ("conversations", "conversation")):
        return "sharegpt"
    if not is_empty(row.get("texts")):
        return "texts"
    if not is_empty(row.get("prompt")) and not is_empty(row.get("completion")):
        return "prompt"
    if "answer" in texts or any(row.get(name) is not None for name in column_names("answer", columns)):
        return "columns"
    keys = ", ".join(sorted(str(key) for key, value in row.items() if value is not None)[:8]) or "none"
    raise RowFault(
        f"no messages, no conversations and no {column_names('answer', columns)[0]} among its keys ({keys}); write "
        '{"messages": [{"role": ..., "content": ...}, ...]} or name its columns under columns',
        kind="missing_field",
    )


def column_names(field: str, columns: Columns) -> Sequence[str]:
    given = columns.get(field)
    if given is None:
        return _ALIASES.get(field, (field,))
    return (given,) if isinstance(given, str) else given


def names_media(row: Row) -> bool:
    """Return whether a row names media itself, in lists, in the parts of its messages, or by marks with a path."""
    if any(not is_empty(row.get(key)) for key in (*_ALIASES["image"], *_ALIASES["video"])):
        return True
    lists = (row.get(key) for key in ("messages", "conversations", "conversation", "prompt"))
    turns = [turn for found in lists if isinstance(found, list) for turn in found if isinstance(turn, dict)]
    contents = [turn.get(key) for turn in turns for key in ("content", "value")]
    parts = [part for found in contents if isinstance(found, list) for part in found if isinstance(part, dict)]
    texts = [text for text in contents if isinstance(text, str)]
    return any(_has_medium(part) for part in parts) or any(
        isinstance(piece, Mark) and piece.path is not None for text in texts for piece in split_marks(text)
    )


def _has_medium(part: Row) -> bool:
    names = ("image", "image_url", "video", "video_url", "path", "url", "base64", "source")
    named = any(not is_empty(part.get(key)) for key in names)
    return named or (part.get("type") not in (None, "text") and not is_empty(part.get("value")))


class RowReader:
    """A row on its way to turns: its keys, the names of its columns, and what was ignored so far."""

    def __init__(self, row: Row, columns: Columns, texts: Mapping[str, str]) -> None:
        self.keys, self.columns, self.texts = Keys(row), columns, texts
        self.ignored: list[str] = []

    def take(self, field: str) -> Any:
        """Return the fixed text of a field, or else what its column holds, None if that is nothing."""
        if field in self.texts:
            return self.texts[field]
        return self.keys.take_text(*column_names(field, self.columns))

    def listed_media(self) -> ListedMedia:
        """Return the media of the row's own columns."""
        taken = [self.keys.take(name) for name in self._media_columns("image")]
        named = taken[0] if len(taken) == 1 and _is_named_by_marks(taken[0]) else {}
        images = list(named.values()) or [image for found in taken for image in _as_list(found)]
        videos = [clip for name in self._media_columns("video") for clip in _clips(self.keys.take(name))]
        options = {}
        if len(videos) == 1:
            names = (*_OF_CLIP, "fps") if isinstance(videos[0], list) else _OF_CLIP
            taken = {name: self.keys.take(*column_names(name, self.columns)) for name in names}
            options = {name: value for name, value in taken.items() if value is not None}
        elif len(videos) > 1 and any(self.keys.holds(name) for name in ("start", "end")):
            fault = f"start and end beside {len(videos)} clips; write them into the part of the clip that they mean"
            raise RowFault(fault, kind="conflicting_fields")
        if isinstance(segment := options.pop("segment", None), list | tuple) and len(segment) == 2:
            options |= {"start": segment[0], "end": segment[1]}
        numbers = {mark: number for number, mark in enumerate(named, start=1)}
        return ListedMedia(images, videos, options, self.keys.take("data_path"), numbers)

    def _media_columns(self, kind: str) -> Sequence[str]:
        if kind in self.columns:
            return column_names(kind, self.columns)
        filled = [name for name in _ALIASES[kind] if not is_empty(self.keys.get(name))]
        return filled if len(filled) < 2 else [self._conflict(filled)]

    def _conflict(self, names: Sequence[str]) -> str:
        fault = f"{names[0]} and {names[1]} are both given; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")

    def close(self, row_format: str) -> list[str]:
        """Return the keys of the row that nothing reads. Raise RowFault where one of them has a meaning."""
        for field in ("boxes", "points"):  # `boxes.py` reads them, and says what is wrong with them
            self.keys.mark_read(*column_names(field, self.columns))
        self.keys.mark_read("objects")
        if isinstance(self.keys.values.get("bbox"), str):
            self.keys.mark_read("bbox", "bbox_layout")
        renamed = {alias for field in (*self.columns, *self.texts) for alias in _ALIASES.get(field, (field,))}
        known = _KNOWN[row_format] - renamed
        if not self.keys.holds("completion"):
            known -= {"prompt"}  # beside messages it is their first question again
        for name in self.keys.unread():
            if name in known:
                remedy = "take it out, or set format to the one that is meant"
                if name in ("chosen", "rejected", "rejected_response"):
                    remedy = "preference pairs are not trained here; give rows of questions and answers"
                fault = f"{name} holds a value that is not read in this row; {remedy}"
                raise RowFault(fault, kind="unknown_field")
        return self.keys.unread()


def metadata_of(unread: Sequence[str], row: Row, media: Sequence[Any]) -> list[str]:
    """Return the unread keys of a row that are metadata, as "row.key".

    media: what the row's parts show. Raise RowFault where there is none and a key holds a picture or a clip; a key that
    holds the name of one that is shown is no news, such as the members of a tar shard.
    """
    if not unread:
        return []
    paths = [medium for medium in media if isinstance(medium, str)]
    shown = {*paths, *map(os.path.basename, paths)}
    names = []
    for key in unread:
        value = row[key][0] if isinstance(row[key], list) else row[key]
        if not media and key not in ("id", "source") and is_medium(value):
            fault = (
                f"{key} holds a picture or a clip that nothing reads; name it, columns: {{image: {key}}}, or remove it"
            )
            raise RowFault(fault, kind="unknown_field")
        if not (isinstance(value, str) and value in shown):
            names.append(f"row.{key}")
    return names


def _is_named_by_marks(value: Any) -> bool:
    """Return whether images are listed by their marks in the texts: {"<image_00>": "a.png"} (MiniCPM-V)."""
    return isinstance(value, dict) and bool(value) and all(is_mark(key) for key in value)


def _as_list(value: Any) -> list[Any]:
    """Return the media of a column, without empty ones; of a table's text, the JSON list that it holds."""
    if isinstance(value, str) and value.startswith('["'):
        value = parse_json(value, "the list of media")
    values = value if isinstance(value, list) else [value]
    return [item for item in values if not is_empty(item)]


def _clips(value: Any) -> list[Any]:
    """Return the clips of a column. A list of nothing but pictures is one clip, of these frames."""
    clips = _as_list(value)
    return [clips] if len(clips) > 1 and all(map(is_picture_path, clips)) else clips
