"""Checks of single values of a row: text, JSON, numbers, times."""

import json
import sys
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.public_names import public_text

_MAX_NESTING = 64  # far above any tool description, far below Python's recursion limit
_SHOWN_CHARACTERS = 60
MAX_SECONDS = 10_000_000.0
"""Of a time in a clip: four months. A larger one is a date, or in other units."""


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_number(value: Any) -> float | None:
    """Return a finite number, also one that is written as text, and None for anything else. "1.5" -> 1.5"""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def shown(value: Any) -> str:
    """Return a value as messages quote it: an integer may have thousands of digits."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"an integer of {value.bit_length():,} bits"
    text = public_text(repr(value))  # before a cut, which could hide where a password ends
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def is_empty(value: Any) -> bool:
    """Return whether a value means that there is none.

    These are null, NaN, "", [], {}, and lists and structs of nothing else, such as [null] and
    {"bytes": null, "path": null}: what typed files and tables put where a row lacks a field. Empty bytes are a damaged
    file, and so something.
    """
    if isinstance(value, str):
        return not value
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return isinstance(value, list | tuple) and all(map(is_empty, value))


def to_json(value: Any) -> str:
    """Write tools and the arguments of calls as the chat template does."""
    return json.dumps(value, ensure_ascii=False)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        fault = f"the key {shown(twice)} is in one object twice; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    return found


decode_json = json.JSONDecoder(object_pairs_hook=_unique_keys).decode
"""Parse a text of JSON, as json.loads does. Raise RowFault where an object has a key twice: one value would be lost."""


def parse_json(text: str, where: str) -> Any:
    try:
        return decode_json(text)
    except RowFault as fault:
        raise fault.at(where) from None
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{where} is not JSON ({str(error)[:80]}); write it as JSON", kind="invalid_json") from None


def wrong_type(where: str, value: Any, rest: str) -> RowFault:
    """Return the fault of a value of another type: `where` is a string, `rest`."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    found = names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
    return RowFault(f"{where} is {found}{rest}", kind="wrong_type")


def check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise wrong_type(where, text, ", not a string; write text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{where} contains half a surrogate pair; write whole characters") from None
    return text


def check_json(value: Any, where: str) -> None:
    """Reject what the template cannot write as JSON: dates or bytes of typed columns, deeply nested brackets."""
    level = [value]
    for _ in range(_MAX_NESTING):
        if not level:
            break
        brackets = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in brackets for inner in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise RowFault(f"{where} is nested more than {_MAX_NESTING} deep; flatten it")
    try:
        text = to_json(value)
    except TypeError as error:
        fault = f"{where} cannot be written as JSON ({error}); write text and numbers"
        raise RowFault(fault, kind="wrong_type") from None
    check_text(text, where)
