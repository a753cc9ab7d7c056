"""From a file and overrides to a Recipe, or to one error that lists everything wrong with them."""

import copy
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from qwen3vl_train.config.fields import (
    CheckpointSection,
    DataSection,
    EvalSection,
    OptimSection,
    ParallelSection,
    Recipe,
    TrainSection,
    Tune,
)
from qwen3vl_train.config.near_names import unknown_key_message
from qwen3vl_train.config.rules import RecipeError, field_conflicts
from qwen3vl_train.config.yaml12 import read_yaml, shown

Fault = tuple[str, str]
# The sections that rules between fields look at, in the order of `field_conflicts`.
_JUDGED: dict[str, TypeAdapter] = {
    "tune": TypeAdapter(Tune),
    "data": TypeAdapter(DataSection),
    "optim": TypeAdapter(OptimSection),
    "train": TypeAdapter(TrainSection),
    "parallel": TypeAdapter(ParallelSection),
    "checkpoint": TypeAdapter(CheckpointSection),
    "eval": TypeAdapter(EvalSection),
}
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list of two numbers",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "dict_type": "a section of keys",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML or JSON recipe, apply overrides such as `optim.lr=2e-5`, check everything.

    An override names a dotted key (`data.train.0.path` reaches into a list) and its value is read as YAML.
    Raises RecipeError that lists all errors at once. Looks at no other file: paths in the recipe are not opened.
    """
    where = str(path)
    values, faults = _read(Path(path))
    for override in overrides or []:
        fault = _apply(values, override)
        if fault:
            faults.append(fault)
    return _check(values, where, faults)


def recipe_from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain values as `load_recipe` does those of a file. where: what the error says they came from."""
    return _check(values, where, [])


def _read(path: Path) -> tuple[dict[str, Any], list[Fault]]:
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(where, ["not UTF-8 text; save it as UTF-8"]) from None
    except OSError as error:
        raise RecipeError(where, [f"cannot be read ({error.strerror}); give a recipe file"]) from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON may be indented with tabs and YAML may not; JSON strings hold none.
    try:
        values, duplicates = read_yaml(text)
    except ValueError as error:
        raise RecipeError(where, [str(error)]) from None
    if not isinstance(values, dict):
        got = "empty" if values is None else f"line 1: a {_kind(values)}"
        raise RecipeError(where, [f"{got}, not a mapping; a recipe is keys and values, such as name: my-run"])
    return values, duplicates


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"


def _apply(values: dict[str, Any], override: str) -> Fault | None:
    """Set one `key=value` in place. Returns a fault where that cannot be done; unknown keys are found later."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        return f"override {override!r}", "not key=value; write it like optim.lr=2e-5"
    try:
        value, duplicates = read_yaml(text)
    except ValueError as error:
        return key, f"override {override!r}: {error}"
    if duplicates:
        return f"{key}.{duplicates[0][0]}", duplicates[0][1]
    spot: Any = values
    for depth, part in enumerate(parts):
        if isinstance(spot, list):
            if not part.isdecimal() or int(part) >= len(spot):
                return key, f"override {override!r}: {part} is no place in a list of {len(spot)}; places start at 0"
        elif not isinstance(spot, dict):
            return key, f"override {override!r}: {'.'.join(parts[:depth])} is {shown(spot)}, not a section"
        place: Any = int(part) if isinstance(spot, list) else part
        if depth == len(parts) - 1:
            spot[place] = value
        elif isinstance(spot, dict) and spot.get(place) is None:
            spot[place] = {}
        spot = spot[place]
    return None


def _check(values: dict[str, Any], where: str, faults: list[Fault]) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
        if not faults:
            return recipe
    except ValidationError as error:
        found = [fault for detail in error.errors() if detail["loc"] for fault in _explain(detail, values)]
        faults = faults + found + _conflicts_of_sound_parts(values, error)
    order = list(Recipe.model_fields)
    faults.sort(key=lambda fault: order.index(top) if (top := fault[0].split(".")[0]) in order else len(order))
    raise RecipeError(where, list(dict.fromkeys(f"{key}: {message}" for key, message in faults)))


def _conflicts_of_sound_parts(values: dict[str, Any], error: ValidationError) -> list[Fault]:
    """Rules between fields, judged without the wrong fields, so that they need no second attempt to show."""
    sound = copy.deepcopy(values)
    wrong = set()
    for detail in error.errors():
        loc = _written_loc(detail)
        wrong.add(".".join(map(str, loc)))
        section = sound.get(loc[0])
        # A default must not stand in for wrong targets: that would blame other fields for it.
        if len(loc) == 2 and isinstance(section, dict) and (loc[0] != "tune" or detail["type"] == "extra_forbidden"):
            section.pop(loc[1], None)
    parts: list[Any] = []
    for name, section in _JUDGED.items():
        try:
            parts.append(section.validate_python(sound.get(name, {})))
        except ValidationError:
            parts.append(None)
    return [conflict for conflict in field_conflicts(*parts) if conflict[0] not in wrong]


def _written_loc(detail: Any) -> list[Any]:
    """Where the fault is in the file: pydantic puts the method of `tune` into the path, the file does not."""
    loc = list(detail["loc"]) or [""]
    if loc[0] == "tune" and len(loc) > 1 and loc[1] in ("lora", "full"):
        del loc[1]
    return [part for part in loc if part != "[key]"]


def _explain(detail: Any, values: dict[str, Any]) -> list[Fault]:
    """Say one pydantic error in our words."""
    kind, got, context = detail["type"], detail["input"], detail.get("ctx", {})
    loc = _written_loc(detail)
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return _unknown(loc, got, values)
    if kind == "recipe":
        return [(key, context["text"])]
    if kind == "missing":
        return [
            (key, "a list of two numbers is needed" if loc[:2] == ["optim", "betas"] else "missing; it has no default")
        ]
    if kind == "union_tag_not_found":
        return [("tune.method", "missing; use lora or full")]
    if kind == "union_tag_invalid":
        return [("tune.method", f"got {shown(got.get('method'))}; use lora or full")]
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace("True", "true").replace("False", "false")
        return [(key, f"got {shown(got)}; use {choices}")]
    if kind in ("too_short", "too_long"):
        return [(key, f"got {len(got)} entries, expected at {'least' if kind == 'too_short' else 'most'} "
                      f"{context.get('min_length', context.get('max_length'))}")]  # fmt: skip
    if kind == "string_too_short":
        return [(key, "got '', expected text")]
    if kind == "invalid_key":
        return [(key, "unknown key; keys of a recipe are words")]
    if got is None and kind in ("model_type", "model_attributes_type", "dict_type"):
        return [(key, "got nothing, expected a section of keys; fill it or leave it out")]
    return [(key, f"got {shown(got)}, expected {_EXPECTED[kind].format(**context)}")]


def _unknown(loc: list[Any], got: Any, values: dict[str, Any]) -> list[Fault]:
    """An unknown key; the keys of an unknown section are each looked up, since their names say more than its own."""
    known = _known_keys(Recipe)
    key = ".".join(str(part) for part in loc)
    if len(loc) == 2 and loc[0] == "tune" and key in known:
        method = values["tune"]["method"]
        return [
            (key, f"not a key of method {method}; leave it out, or use method {'full' if method == 'lora' else 'lora'}")
        ]
    if len(loc) == 1 and isinstance(got, dict) and got:
        return [(f"{key}.{name}", unknown_key_message(f"{key}.{name}", known)) for name in got]
    return [(key, unknown_key_message(key, known))]


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the recipe; `*` stands for a place in a list."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        keys.append(key)
        for part in _models_in(field.annotation):
            inner = f"{key}.*." if get_origin(field.annotation) is list else f"{key}."
            keys += [found for found in _known_keys(part, inner) if found not in keys]
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models_in(part)]
