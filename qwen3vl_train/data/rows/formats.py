"""The formats of rows, each rewritten as OpenAI messages, which `messages.py` then checks.

openai      {"messages": [{"role", "content"}]}, with media in typed parts, or listed separately under images and videos
sharegpt    {"conversations": [{"from", "value"}]}, media listed separately, `<image>` and `<video>` placeholders in the
            questions; LLaVA's JSON, and that of Qwen's own fine-tuning scripts with its data_path
columns     {"question", "answer", "image"}, or whatever the recipe's `columns` calls them
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwen3vl_train.data.errors import RowFault

Row = dict[str, Any]
FORMATS = ("openai", "sharegpt", "columns")
READ_COLUMNS = (
    "messages", "conversations", "conversation", "tools", "system", "image", "images", "video", "videos", "data_path",
    "question", "answer", "reasoning", "boxes", "points", "bbox", "bbox_layout",
)  # fmt: skip
"""Every column that is read from typed files, unless `columns` renames it."""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_PLACEHOLDER = re.compile(r"(<image>|<video>)")
_BREAK_AFTER, _BREAK_BEFORE = re.compile(r"^[^\S\n]*\n\s*"), re.compile(r"\s*\n[^\S\n]*$")


def detect_format(row: Row, columns: Mapping[str, str]) -> str:
    """Return the format of a row, a member of FORMATS. Raise RowFault when it has none of them."""
    messages = row.get("messages")
    if messages is not None:
        first = messages[0] if isinstance(messages, list) and messages else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "openai"
    if row.get("conversations") is not None or row.get("conversation") is not None:
        return "sharegpt"
    if row.get(columns.get("answer", "answer")) is not None:
        return "columns"
    keys = ", ".join(sorted(str(key) for key, value in row.items() if value is not None)[:8]) or "none"
    raise RowFault(
        f"no messages, no conversations and no {columns.get('answer', 'answer')} among its keys ({keys}); write "
        '{"messages": [{"role": ..., "content": ...}, ...]} or name its columns under columns',
        kind="missing_field",
    )


def to_messages(row: Row, row_format: str, columns: Mapping[str, str]) -> Row:
    """Rewrite a row of a known format as {"messages", "tools"}. Its values are not checked yet.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]} ->
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    ...]}. Raise RowFault, also when placeholders and media differ in number.
    """
    media = _ListedMedia(row, columns)
    if row_format == "openai":
        messages = row.get("messages")
    elif row_format == "sharegpt":
        messages = _sharegpt_messages(row)
    else:
        messages = _column_messages(row, columns, media)
    if isinstance(messages, list):
        messages = media.insert_into(messages)
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse_json(tools, "tools") if tools.strip() else None
    return {"messages": messages, "tools": tools}


def _sharegpt_messages(row: Row) -> Any:
    turns = next((row[key] for key in ("conversations", "conversation", "messages") if row.get(key) is not None), None)
    if not isinstance(turns, list):
        raise RowFault("conversations is not a list; write a list of {from, value}", kind="wrong_type")
    messages = [_sharegpt_message(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else messages


def _sharegpt_message(turn: Any, where: str) -> Row:
    if not isinstance(turn, dict):
        raise RowFault(f"{where} is not an object; write from and value", kind="wrong_type")
    message = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    speaker = turn.get("from") if turn.get("from") is not None else turn.get("role")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RowFault(f"{where}: unknown speaker {str(speaker)[:50]!r}; use {', '.join(_ROLES)}")
    message["role"] = _ROLES[speaker]
    if turn.get("value") is not None:
        message["content"] = turn["value"]
    if speaker == "function_call":
        calls = message.pop("content", None)
        calls = _parse_json(calls, f"{where}.value") if isinstance(calls, str) else calls
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    return message


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{where} is not JSON ({str(error)[:80]}); write it as JSON", kind="invalid_json") from None


def _column_messages(row: Row, columns: Mapping[str, str], media: "_ListedMedia") -> list[Any]:
    question, system, answer, reasoning = (
        row.get(columns.get(name, name)) for name in ("question", "system", "answer", "reasoning")
    )
    if question is not None and not isinstance(question, str):
        fault = f"column {columns.get('question', 'question')} is not text; name the question's column"
        raise RowFault(fault, kind="wrong_type")
    content: Any = question or ""
    if not _PLACEHOLDER.search(content):
        content = media.take_all() + ([{"type": "text", "text": question}] if question else [])
    if not content:
        raise RowFault("neither a question nor an image; give a question", kind="missing_field")
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer, "reasoning_content": reasoning},
    ]


class _ListedMedia:
    """The media that a row lists separately from its texts, until they are inserted at their placeholders."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        folder = row.get("data_path")
        self.values = {
            kind: [_join_folder(folder, value) for value in _listed(row, kind, columns)] for kind in ("image", "video")
        }
        self.num_wanted = {"image": 0, "video": 0}  # placeholders, and parts without their medium
        self.num_empty = self.num_own = 0  # parts without and with their medium

    def take_all(self) -> list[Row]:
        """Return all media as parts, and forget them."""
        parts = [{"type": kind, kind: value} for kind, values in self.values.items() for value in values]
        self.values = {"image": [], "video": []}
        return parts

    def insert_into(self, messages: list[Any]) -> list[Any]:
        """Insert the media at their placeholders. Raise RowFault where their numbers differ.

        In a row with typed parts and no listed media, placeholders are plain text: there the parts name the media.
        """
        filled = [self._fill(message) if _is_question(message) else message for message in messages]
        typed = any(_is_question(message) and isinstance(message.get("content"), list) for message in messages)
        if not any(self.values.values()) and (not any(self.num_wanted.values()) or (typed and not self.num_empty)):
            return messages
        for kind, values in self.values.items():
            listed, wanted = len(values), self.num_wanted[kind]
            if listed == wanted:
                continue
            remedy = f"list one {kind} for each, or write typed parts, in which a text is a text"
            if listed:
                remedy = f"put one placeholder where each {kind} belongs"
            if (own := self.num_own) > 0:
                remedy = f"the parts contain {own} of their own: list no others, or leave parts without media for them"
            given = f"{listed} {kind}{'s' * (listed != 1)}"
            placeholders = f"{wanted} <{kind}> placeholder{'s' * (wanted != 1)} in the questions"
            raise RowFault(f"{given} but {placeholders}; {remedy}", kind="media_mismatch")
        return filled

    def _next(self, kind: str) -> Any:
        """Return the next medium of a kind; None after the last, which is a fault once all are counted."""
        number = self.num_wanted[kind]
        self.num_wanted[kind] += 1
        return self.values[kind][number] if number < len(self.values[kind]) else None

    def _fill(self, message: Row) -> Row:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self._split(content)}
        if not isinstance(content, list):
            return message
        parts: list[Any] = []
        for part in content:
            known = part if isinstance(part, dict) else {"text": part}
            kind, text, has_medium = known.get("type"), known.get("text"), _has_medium(known)
            if kind in ("image", "video") and not has_medium:
                self.num_empty += 1
                parts.append({**known, kind: self._next(kind)})
            elif isinstance(text, str) and _PLACEHOLDER.search(text):
                pieces = self._split(text)
                parts += pieces if isinstance(part, dict) else [part]  # a bare string is a fault of its own
            else:
                self.num_own += has_medium and not isinstance(text, str)
                parts.append(part)
        return {**message, "content": parts}

    def _split(self, text: str) -> list[Row]:
        """Split a text at its placeholders. A line break next to one, and the blanks around it, are removed with it.

        "<image>\\nWhat?" -> image, "What?"; "Is <image> red?" -> "Is ", image, " red?"
        """
        parts: list[Row] = []
        pieces = _PLACEHOLDER.split(text)
        for index, piece in enumerate(pieces):
            if index % 2:
                kind = piece[1:-1]
                parts.append({"type": kind, kind: self._next(kind)})
                continue
            if index > 0:
                piece = _BREAK_AFTER.sub("", piece)
            if index + 1 < len(pieces):
                piece = _BREAK_BEFORE.sub("", piece)
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts


def names_media(row: Row) -> bool:
    """Return whether a row names media itself, in lists or in the parts of its messages."""
    if any(row.get(key) for key in ("image", "images", "video", "videos")):
        return True
    messages = _objects(row.get(key) for key in ("messages", "conversations", "conversation"))
    parts = _objects(message.get(key) for message in messages for key in ("content", "value"))
    return any(map(_has_medium, parts))


def _objects(lists: Iterable[Any]) -> list[Row]:
    return [item for found in lists if isinstance(found, list) for item in found if isinstance(item, dict)]


def _listed(row: Row, kind: str, columns: Mapping[str, str]) -> list[Any]:
    name = columns.get(kind)
    found = [key for key in ([name] if name else [kind, f"{kind}s"]) if row.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise RowFault(f"{found[0]} and {found[1]} are both given; keep one of them", kind="conflicting_fields")
    value = row[found[0]] if found else []
    return value if isinstance(value, list) else [value]


def _join_folder(folder: Any, value: Any) -> Any:
    """Prepend a row's data_path to a path, or to each frame of a list or of {"frames": [...], "fps": 2}."""
    if isinstance(value, list):
        return [_join_folder(folder, item) for item in value]
    if isinstance(value, dict) and "frames" in value:
        return {**value, "frames": _join_folder(folder, value["frames"])}
    if not folder or not isinstance(value, str) or value.startswith("data:") or "://" in value:
        return value
    if not isinstance(folder, str):
        raise RowFault("data_path is not a path; write a folder", kind="wrong_type")
    return os.path.join(folder, value)


def _is_question(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("user", "tool")


def _has_medium(part: Row) -> bool:
    return any(part.get(key) is not None for key in ("image", "image_url", "video", "video_url"))
