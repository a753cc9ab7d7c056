"""The shapes that rows come in, each rewritten as OpenAI messages; `formats.py` then checks all of them alike.

openai      {"messages": [{"role", "content"}]}, with media in typed parts, or apart from them under images and videos
sharegpt    {"conversations": [{"from", "value"}]}, media apart, `<image>` and `<video>` marks in the questions; LLaVA's
            JSON, and that of Qwen's own fine-tuning scripts with its data_path
columns     {"question", "answer", "image"}, or whatever the recipe's `columns` calls them
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3vl_train.data.errors import RowFault

Row = dict[str, Any]
SHAPES = ("openai", "sharegpt", "columns")
COLUMNS = ("question", "answer", "system", "reasoning", "image", "video", "boxes", "points")
"""What `columns` can name a column for."""
READ_COLUMNS = (
    "messages", "conversations", "conversation", "tools", "system", "image", "images", "video", "videos", "data_path",
    "question", "answer", "reasoning", "boxes", "points", "bbox", "bbox_layout",
)  # fmt: skip
"""Every column that is looked at; typed files are read no further."""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_MARK = re.compile(r"(<image>|<video>)")
_BREAK_BEHIND, _BREAK_BEFORE = re.compile(r"^[^\S\n]*\n\s*"), re.compile(r"\s*\n[^\S\n]*$")


def recognise(row: Row, columns: Mapping[str, str]) -> str:
    """Return the shape of a row, a member of SHAPES. Raises RowFault when it has none of them."""
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


def to_messages(row: Row, shape: str, columns: Mapping[str, str]) -> Row:
    """Rewrite a row of a known shape as {"messages", "tools"}. The values in it are still to be checked.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]} ->
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    ...]}. Raises RowFault, also when marks and media do not match in number.
    """
    media = _Media(row, columns)
    if shape == "openai":
        messages = row.get("messages")
    elif shape == "sharegpt":
        messages = _turns(row)
    else:
        messages = _question_and_answer(row, columns, media)
    if isinstance(messages, list):
        messages = media.placed(messages)
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    return {"messages": messages, "tools": tools}


def _turns(row: Row) -> Any:
    turns = next((row[key] for key in ("conversations", "conversation", "messages") if row.get(key) is not None), None)
    if not isinstance(turns, list):
        raise RowFault("conversations is not a list; write a list of {from, value}", kind="wrong_type")
    system = row.get("system")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    return messages + [_turn(turn, f"conversations[{place}]") for place, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Row:
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
        calls = _parsed(calls, f"{where}.value") if isinstance(calls, str) else calls
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    return message


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{where} is not JSON ({str(error)[:80]}); write it as JSON", kind="invalid_json") from None


def _question_and_answer(row: Row, columns: Mapping[str, str], media: "_Media") -> list[Any]:
    def value(name: str) -> Any:
        return row.get(columns.get(name, name))

    question, messages = value("question"), []
    if question is not None and not isinstance(question, str):
        raise RowFault(
            f"column {columns.get('question', 'question')} is no text; name the question's column", kind="wrong_type"
        )
    if value("system"):
        messages.append({"role": "system", "content": value("system")})
    content: Any = question or ""
    if not _MARK.search(content):
        content = media.all_parts() + ([{"type": "text", "text": question}] if question else [])
        media.clear()
    if not content:
        raise RowFault("neither question nor image; a row asks something", kind="missing_field")
    answer = {"role": "assistant", "content": value("answer"), "reasoning_content": value("reasoning")}
    return [*messages, {"role": "user", "content": content}, answer]


class _Media:
    """The media a row names apart from its text, still to be put where they belong."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        folder = row.get("data_path")
        self.values = {
            kind: [_inside(folder, value) for value in _listed(row, kind, columns)] for kind in ("image", "video")
        }

    def all_parts(self) -> list[Row]:
        return [{"type": kind, kind: value} for kind, values in self.values.items() for value in values]

    def clear(self) -> None:
        self.values = {"image": [], "video": []}

    def placed(self, messages: list[Any]) -> list[Any]:
        """Put the media at their marks. Raises RowFault where numbers differ.

        In a row with typed parts and no media apart from them, marks are plain text: there the parts say what is one.
        """
        marks, typed, own = _count_marks(messages)
        wanted = {kind: marks[kind] + marks["valueless"].count(kind) for kind in self.values}
        if not any(self.values.values()) and (not any(wanted.values()) or (typed and not marks["valueless"])):
            return messages
        for kind, values in self.values.items():
            if len(values) != wanted[kind]:
                raise RowFault(_miscounted(kind, len(values), wanted[kind], own), kind="media_mismatch")
        pools = {kind: iter(values) for kind, values in self.values.items()}
        return [_with_media(message, pools) if _asks(message) else message for message in messages]


def _miscounted(kind: str, listed: int, marked: int, own: int) -> str:
    if own:
        remedy = f"the parts hold {own} of their own: list none beside them, or leave parts without media for them"
    elif listed:
        remedy = f"put one mark where each {kind} belongs"
    else:
        remedy = f"list one {kind} for each, or write typed parts, in which a text is a text"
    return (
        f"{listed} {kind}{'s' * (listed != 1)} but {marked} <{kind}> mark{'s' * (marked != 1)} in the questions; "
        f"{remedy}"
    )


def holds_media(row: Row) -> bool:
    """Say whether a row names its media itself, in lists or in the parts of its messages."""
    if any(row.get(key) for key in ("image", "images", "video", "videos")):
        return True
    lists = [row.get(key) for key in ("messages", "conversations", "conversation")]
    messages = [message for found in lists if isinstance(found, list) for message in found if isinstance(message, dict)]
    contents = [message.get(key) for message in messages for key in ("content", "value")]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(_holds_medium(part) for part in parts)


def _listed(row: Row, kind: str, columns: Mapping[str, str]) -> list[Any]:
    name = columns.get(kind)
    found = [key for key in ([name] if name else [kind, f"{kind}s"]) if row.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise RowFault(f"{found[0]} and {found[1]} are both given; keep one of them", kind="conflicting_fields")
    if not found:
        return []
    value = row[found[0]]
    return value if isinstance(value, list) else [value]


def _inside(folder: Any, value: Any) -> Any:
    """Put a row's data_path before a path, or before each frame of a list or of {"frames": [...], "fps": 2}."""
    if isinstance(value, list):
        return [_inside(folder, item) for item in value]
    if isinstance(value, dict) and "frames" in value:
        return {**value, "frames": _inside(folder, value["frames"])}
    if not folder or not isinstance(value, str) or value.startswith("data:") or "://" in value:
        return value
    if not isinstance(folder, str):
        raise RowFault("data_path is not a path; write a folder", kind="wrong_type")
    return os.path.join(folder, value)


def _asks(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("user", "tool")


def _count_marks(messages: list[Any]) -> tuple[dict[str, Any], bool, int]:
    """Return (marks of each kind in text, kinds of parts that name no medium), whether any question is written as
    parts, and the number of parts that name a medium.
    """
    marks: dict[str, Any] = {"image": 0, "video": 0, "valueless": []}
    own = 0
    for text, part in _texts_and_parts(messages):
        if text is not None:
            for mark in _MARK.findall(text):
                marks[mark[1:-1]] += 1
        elif (kind := _valueless(part)) is not None:
            marks["valueless"].append(kind)
        else:
            own += _holds_medium(part)
    return marks, any(_asks(message) and isinstance(message.get("content"), list) for message in messages), own


def _texts_and_parts(messages: list[Any]) -> Iterator[tuple[str | None, Any]]:
    """Yield (text, None) for each text of a question and (None, part) for each other part."""
    for message in messages:
        content = message.get("content") if _asks(message) else None
        for part in [content] if isinstance(content, str) else content if isinstance(content, list) else []:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text, None
            elif isinstance(part, dict):
                yield None, part


def _valueless(part: Row) -> str | None:
    """Return 'image' or 'video' for a part that says what stands there but not which."""
    kind = part.get("type")
    return kind if kind in ("image", "video") and not _holds_medium(part) else None


def _holds_medium(part: Row) -> bool:
    return any(part.get(key) is not None for key in ("image", "image_url", "video", "video_url"))


def _with_media(message: Row, pools: dict[str, Iterator[Any]]) -> Row:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _split(content, pools)}
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for part in content:
        kind = _valueless(part) if isinstance(part, dict) else None
        if kind is not None:
            parts.append({**part, kind: next(pools[kind])})
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and _MARK.search(part["text"]):
            parts += _split(part["text"], pools)
        else:
            parts.append(part)
    return {**message, "content": parts}


def _split(text: str, pools: dict[str, Iterator[Any]]) -> list[Row]:
    """Cut a text at its marks. A line break next to a mark, and the blanks around it, are the mark's and go with it.

    "<image>\\nWhat?" -> image, "What?"; "Is <image> red?" -> "Is ", image, " red?"
    """
    parts: list[Row] = []
    pieces = _MARK.split(text)
    for place, piece in enumerate(pieces):
        if place % 2:
            kind = piece[1:-1]
            parts.append({"type": kind, kind: next(pools[kind])})
            continue
        if place > 0:
            piece = _BREAK_BEHIND.sub("", piece)
        if place + 1 < len(pieces):
            piece = _BREAK_BEFORE.sub("", piece)
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
