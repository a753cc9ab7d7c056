"""The turns of a row in each format."""

import json
from collections.abc import Sequence
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.formats import TURN_KEYS, Row, RowReader, column_names
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.messages import Turn, read_turn, read_turns, untrained
from qwen3vl_train.data.rows.values import is_empty, parse_json, to_json, wrong_type


def read_all_turns(reader: RowReader, row_format: str) -> list[Turn]:
    """Return the turns of a row of a format, its system first. Raise RowFault."""
    return _with_system(reader, _READERS[row_format](reader))


def _openai(reader: RowReader) -> list[Turn]:
    return read_turns(reader.keys.get("messages"), "messages", reader.ignored)


def _sharegpt(reader: RowReader) -> list[Turn]:
    name = next((key for key in TURN_KEYS["sharegpt"] if reader.keys.values.get(key) is not None), "conversations")
    turns = reader.keys.get(name)
    if isinstance(turns, list) and turns and all(map(_is_pair, turns)):
        return _pairs(turns, name, reader.ignored)
    return read_turns(turns, name, reader.ignored)


_ASKED, _ANSWERED = ("user", "human", "question"), ("assistant", "gpt", "bot", "answer")


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, dict) and any(key in turn for key in _ASKED) and any(key in turn for key in _ANSWERED)


def _texts(reader: RowReader) -> list[Turn]:
    texts = reader.keys.get("texts")
    texts = parse_json(texts, "texts") if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(map(_is_pair, texts)):
        fault = 'texts is not a list of questions and answers; write [{"user": ..., "assistant": ...}]'
        raise RowFault(fault, kind="wrong_type")
    return _pairs(texts, "texts", reader.ignored)


def _pairs(pairs: Sequence[Row], name: str, ignored: list[str]) -> list[Turn]:
    turns: list[Turn] = []
    for index, pair in enumerate(pairs):
        keys = Keys(pair, f"{name}[{index}]")
        question, answer = keys.take(*_ASKED) or "", keys.take_text(*_ANSWERED)
        turns += read_turn({"role": "user", "content": question}, keys.where, ignored)
        turns += read_turn({"role": "assistant", "content": answer}, keys.where, ignored)
        ignored += [f"turn.{key}" for key in keys.close({*_ASKED, *_ANSWERED}, "a question with its answer")]
    return turns


def _prompt(reader: RowReader) -> list[Turn]:
    """Read TRL's prompt and completion. Answers in the prompt are not trained."""
    prompt, completion = (reader.keys.get(name) for name in ("prompt", "completion"))
    asked = [{"role": "user", "content": prompt}] if _is_plain(prompt) else prompt
    answered = [{"role": "assistant", "content": completion}] if _is_plain(completion) else completion
    turns = untrained(read_turns(asked, "prompt", reader.ignored))
    return turns + read_turns(answered, "completion", reader.ignored)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a text, and not the JSON of a list of messages."""
    if not isinstance(value, str):
        return False
    try:
        messages = json.loads(value) if value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return True
    return not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages))


def _columns(reader: RowReader) -> list[Turn]:
    question, answer, reasoning = (reader.take(name) for name in ("question", "answer", "reasoning"))
    if question is not None and not isinstance(question, str):
        fault = f"column {column_names('question', reader.columns)[0]} is not text; name the question's column"
        raise RowFault(fault, kind="wrong_type")
    mapped = {name for field in reader.columns for name in column_names(field, reader.columns)}
    more, history = (reader.keys.take(name) if name not in mapped else None for name in ("input", "history"))
    if more is not None:
        if not isinstance(more, str):
            raise wrong_type("input", more, ", not a string; write text")
        question = f"{question}\n{more}" if question else more
    has_media = any(not is_empty(reader.keys.values.get(name)) for kind in ("image", "video")
                    for name in column_names(kind, reader.columns))  # fmt: skip
    if not question and not has_media:
        raise RowFault("neither a question nor an image; give a question", kind="missing_field")
    asked, answered = column_names("question", reader.columns)[0], column_names("answer", reader.columns)[0]
    final = {"role": "assistant", "content": _answer(reader, answer), "reasoning_content": reasoning or None}
    return [
        *_history(history, reader.ignored),
        *read_turn({"role": "user", "content": question or ""}, asked, reader.ignored),
        *read_turn(final, answered, reader.ignored),
    ]


def _answer(reader: RowReader, answer: Any) -> Any:
    """Return an answer as text: the first of a list, a number as JSON writes it."""
    if isinstance(answer, list):
        name = next(name for name in column_names("answer", reader.columns) if reader.keys.holds(name))
        reader.ignored += [f"row.{name}[1:]"] if len(answer) > 1 else []
        answer = next((item for item in answer if not is_empty(item)), None)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return to_json(answer)
    return answer


def _history(history: Any, ignored: list[str]) -> list[Turn]:
    """Return the turns of [[question, answer], ...]."""
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RowFault("history is not a list of [question, answer]; write pairs", kind="wrong_type")
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(_SIDES, pair, strict=True)]
    return read_turns(turns, "history", ignored) if turns else []


_SIDES = ("user", "assistant")
_READERS = {"openai": _openai, "sharegpt": _sharegpt, "texts": _texts, "prompt": _prompt, "columns": _columns}


def _with_system(reader: RowReader, turns: list[Turn]) -> list[Turn]:
    """Insert the row's system, or the recipe's, as the first turn."""
    system = reader.take("system")
    if not system:
        return turns
    if any(turn.role == "system" for turn in turns):
        if "system" in reader.texts:
            return turns
        fault = "system is given beside the turns and as one of them; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    return [*read_turns([{"role": "system", "content": system}], "system", reader.ignored), *turns]
