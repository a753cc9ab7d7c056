"""From Arrow to the objects of a row: JSON texts are decoded, class labels named, nulls of absent keys dropped.

Typed files (Parquet, Arrow, `datasets`) give every row of a column the same keys, and null where a row has none:

    {"name": "zoom", "arguments": {"factor": 2.0, "x": None}} -> {"name": "zoom", "arguments": {"factor": 2.0}}

`datasets` stores values of mixed types as JSON texts (its `Json` feature), and the names of class labels apart:

    {"role": "user", "content": '[{"type":"text","text":"Hi"}]'} -> {"role": "user", "content": [{"type": "text", ...}]}
"""

import json
import re
from collections.abc import Callable
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.formats import column_names
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.sources.base import is_turn

Convert = Callable[[Any], Any]
_MEDIUM = {"bytes", "path"}
"""Keys of the struct of a medium, which is one value: its nulls say that it has none."""
_TEXT_KEYS = {
    "content", "value", "text", "reasoning_content", "reasoning", "question", "answer", "system", "prompt",
    "completion", "input", "user", "assistant",
}  # fmt: skip
_MESSAGE_KEYS = {"content", "value", "text", "reasoning_content"}
"""Of messages and their parts, where a list of bare strings is none of ours."""
_CALL_KEYS = {"tools", "tool_calls", "functions", "function_call"}
"""Below these, names are those of functions and of their arguments, not ours."""
_PART_KEYS = {"type", "text", "image", "image_url", "video", "video_url"}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def row_converter(schema: Any, rules: RowRules) -> Convert:
    """Return a function: row as `to_pylist` gives it -> its objects. It raises RowFault.

    schema: of Arrow; with the features of `datasets` in its metadata, if it has them.
    """
    features = _features_of(schema)
    texts = text_keys(rules)
    converters = {
        field.name: convert
        for field in schema
        if (convert := _converter(field.type, features.get(field.name), field.name, texts)) is not None
    }

    def convert_row(row: dict[str, Any]) -> dict[str, Any]:
        for name, convert in converters.items():
            if row.get(name) is not None:
                try:
                    row[name] = convert(row[name])
                except RowFault as fault:
                    raise fault.at(name) from None
        return row

    return convert_row


def text_keys(rules: RowRules) -> set[str]:
    """Return the names of all columns and keys that hold text."""
    return _TEXT_KEYS | {name for field in _TEXT_KEYS for name in column_names(field, rules.columns)}


def _features_of(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` wrote into the metadata of a schema, {} where there are none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _converter(arrow_type: Any, feature: Any, key: str, texts: set[str]) -> Convert | None:
    """Return the function for the values of one type, None where they stay as they are. key: their name."""
    import pyarrow.types as types

    kind = feature.get("_type") if isinstance(feature, dict) else None
    texts = set() if key in _CALL_KEYS else texts
    if getattr(arrow_type, "extension_name", "") == "arrow.json" or kind == "Json":
        return lambda value: _decode(value, key if key in texts or key == "arguments" else None)
    if kind == "ClassLabel" and isinstance(names := feature.get("names"), list) and types.is_integer(arrow_type):
        return lambda value: _label_name(value, names)
    if types.is_struct(arrow_type):
        return _struct_converter(arrow_type, feature, kind, texts)
    if types.is_map(arrow_type):
        convert = _converter(arrow_type.item_type, None, key, texts) or _unchanged
        return lambda pairs: {name: None if item is None else convert(item) for name, item in pairs}
    if types.is_dictionary(arrow_type):
        return _converter(arrow_type.value_type, feature, key, texts)
    if _is_list(arrow_type):
        convert = _converter(arrow_type.value_type, _item_feature(feature), key, texts)
        return None if convert is None else lambda values: [None if item is None else convert(item) for item in values]
    return None


def _struct_converter(arrow_type: Any, feature: Any, kind: Any, texts: set[str]) -> Convert | None:
    fields = [arrow_type.field(index) for index in range(arrow_type.num_fields)]
    if {field.name for field in fields} <= _MEDIUM:
        return None
    inner = feature if isinstance(feature, dict) else {}
    if kind == "Sequence" and isinstance(feature.get("feature"), dict):  # of a struct: a struct of lists
        inner = {name: {"_type": "List", "feature": node} for name, node in feature["feature"].items()}
    converters = {field.name: _converter(field.type, inner.get(field.name), field.name, texts) for field in fields}

    def convert_struct(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: item if (convert := converters[name]) is None else convert(item)
            for name, item in value.items()
            if item is not None
        }

    return convert_struct


def _unchanged(value: Any) -> Any:
    return value


def _is_list(arrow_type: Any) -> bool:
    import pyarrow.types as types

    return any(
        is_kind(arrow_type)
        for is_kind in (
            types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view
        )
    )  # fmt: skip


def _item_feature(feature: Any) -> Any:
    """Return the feature of the items of a list: {"feature": ..., "_type": "List"}, or [...] of older versions."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def _label_name(value: int, names: list[Any]) -> str | None:
    """Return the name of a class; -1 is the class of a row that has none."""
    if value == -1:
        return None
    if not 0 <= value < len(names):
        raise RowFault(f"class {value} of {len(names)}; write the names of classes as text")
    return str(names[value])


def _decode(text: Any, text_key: str | None) -> Any:
    """Return the value that a text of the `Json` feature holds. text_key: the name of what may hold text.

    `datasets` stores a string that happens to be JSON as it is, and any other value as JSON: where text is expected,
    `7` and `{"a": 1}` were such strings.
    """
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if text_key is None or isinstance(value, str):
        return value
    if _is_typed_parts(value):
        return value  # a text like it is read as parts too
    if not isinstance(value, dict | list) or not _is_compact(text):
        return text
    if text_key == "arguments":
        return value
    if value == []:
        fault = "is [] as `datasets` stores it, be it text or an empty list; read the JSON file itself, without split"
        raise RowFault(fault, kind="invalid_value")
    return value if _may_be_content(value, text_key) else text


def _is_compact(text: str) -> bool:
    """Return whether an object or a list is written as `datasets` writes it: in ASCII, without blanks, `/` as `\\/`."""
    is_written_otherwise = re.search(r"\s", _STRING.sub("", text)) or "/" in re.sub(r"\\.", "", text)
    return text.isascii() and not is_written_otherwise


def _is_typed_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and str(item.get("type")) in _PART_KEYS for item in value)
    )


def _may_be_content(value: Any, key: str) -> bool:
    """Return whether a list or an object may be content: parts, turns, or in a column of answers several texts."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, str) for item in items):
        return key not in _MESSAGE_KEYS
    return all(is_turn(item) or (isinstance(item, dict) and bool(item.keys() & _PART_KEYS)) for item in items)
