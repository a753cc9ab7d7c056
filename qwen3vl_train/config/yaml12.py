"""Read and write YAML 1.2, in which 1e-4 is a number and `off` a word, without duplicate keys and object tags.

PyYAML knows version 1.1 only. ruamel.yaml 0.19 knows 1.2, but also takes 1_000 for an integer and 2024-01-01 for a
date, follows aliases and merges, stops at the first duplicate key, and writes `off` without quotes.
"""

import re
import reprlib
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

_PLAIN = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """Load the YAML 1.2 core types safely, keep the first of duplicate keys and collect the others in `duplicates`."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of YAML 1.1, so `<<` is a key like any other
    yaml_constructors: ClassVar[dict] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_PLAIN) in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.duplicates: list[tuple[str, str]] = []

    def note_duplicates(self, node: Node, prefix: str = "") -> None:
        """Walk the nodes before they become dicts, and drop every later one of equal keys."""
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.note_duplicates(item, f"{prefix}{index}.")
        if not isinstance(node, MappingNode):
            return
        first: dict[str, int] = {}
        kept = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, ScalarNode) and key.value in first:
                lines = f"lines {first[key.value]} and {line}" if line > first[key.value] else f"line {line}"
                self.duplicates.append((f"{prefix}{key.value}", f"given twice, on {lines}; keep one"))
                continue
            if isinstance(key, ScalarNode):
                first[key.value] = line
                self.note_duplicates(value, f"{prefix}{key.value}.")
            kept.append((key, value))
        node.value = kept

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not read in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError) as error:
            raise yaml.constructor.ConstructorError(None, None, f"bad value ({error})", node.start_mark) from None


class Dumper(yaml.SafeDumper):
    """Write plain text in quotes wherever either version of YAML would read it as another type."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        key: list(found) for key, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: Dumper, text: str) -> ScalarNode:
    # In single quotes PyYAML folds these line breaks into spaces; in double quotes it escapes them.
    style = '"' if {"\x85", "\u2028", "\u2029"} & set(text) else None
    return dumper.represent_scalar(_PLAIN + "str", text, style)


def _int(loader: Loader, node: ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(loader: Loader, node: ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: Loader, node: ScalarNode) -> str:
    # JSON writes characters beyond 16 bits as two escapes; join them, and raise on an unpaired one.
    return loader.construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16")


for _name, (_pattern, _starts) in _SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_PLAIN + _name, re.compile(f"(?:{_pattern})\\Z"), _starts)
Loader.add_constructor(_PLAIN + "int", _int)
Loader.add_constructor(_PLAIN + "float", _float)
Loader.add_constructor(_PLAIN + "str", _text)
Dumper.add_representer(str, _write_text)


def read_yaml(text: str) -> tuple[Any, list[tuple[str, str]]]:
    """Return plain values of one YAML document, and its duplicate keys as (dotted key, message with both lines).

    Raises ValueError with line and reason for text that is not YAML, and for tags, anchors and more than one document.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        loader.note_duplicates(node)
        return loader.construct_document(node), loader.duplicates
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"line {mark.line + 1}: not YAML: {problem}" if mark else f"not YAML: {problem}") from None
    except RecursionError:
        raise ValueError("not a recipe: nested too deep") from None


def write_yaml(values: dict[str, Any]) -> str:
    """Return text that `read_yaml` reads back to the same values, keys in the given order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def format_value(value: Any) -> str:
    """Return a value for a message, cut short: text in quotes, the rest as YAML spells it."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:77]}...")
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return reprlib.repr(value)
