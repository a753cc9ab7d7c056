"""docs/coming_from.md: every field of ours in it is one, and every field of others is answered with ours."""

import re
from pathlib import Path

import pytest

from qwen3vl_train.config import RecipeError, load_recipe
from qwen3vl_train.config.loading import recipe_from_dict
from qwen3vl_train.config.yaml12 import read_yaml

DOCUMENT = Path(__file__).parents[2] / "docs" / "coming_from.md"
SMALL = {"name": "a", "model": {"path": "m"}, "tune": {"method": "lora"}, "data": {"train": [{"path": "a.jsonl"}]}}


def _rows() -> list[tuple[list[str], list[str]]]:
    """Return (names of others, ours as `key: value`) of each row of the tables."""
    rows = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if not line.startswith("| ") or cells[0] == "LLaMA-Factory":
            continue
        assert len(cells) == 5, line
        *theirs, ours = (re.findall(r"`([^`]+)`", cell) for cell in cells[:4])
        rows.append(([name for names in theirs for name in names], ours))
    return rows


ROWS = _rows()
WITH_FIELDS = [pytest.param(theirs, ours, id=ours[0]) for theirs, ours in ROWS if ours]


def test_the_tables_are_read():
    assert len(ROWS) > 70


@pytest.mark.parametrize(("theirs", "ours"), WITH_FIELDS)
def test_our_fields_take_the_values_shown(theirs, ours, tmp_path):
    (tmp_path / "small.yaml").write_text(str(SMALL))
    recipe = load_recipe(tmp_path / "small.yaml", [setting.replace(": ", "=", 1) for setting in ours]).to_dict()
    for setting in ours:
        key, _, text = setting.partition(": ")
        found = recipe
        for part in key.split("."):
            found = found[part]
        assert _holds(found, read_yaml(text)[0]), f"{setting} became {found}"


def _holds(found, wanted) -> bool:
    """Return whether a value of the recipe is the wanted one, or a section or list that holds it."""
    if isinstance(wanted, dict):
        return all(_holds(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_holds, found, wanted))
    if wanted == "full" and isinstance(found, dict):  # activation checkpointing of both towers
        return set(found.values()) == {"full"}
    return found == wanted


@pytest.mark.parametrize(("theirs", "ours"), WITH_FIELDS)
def test_their_names_are_answered_with_ours(theirs, ours):
    keys = [key for setting in ours for key in _keys(setting)]
    for name in (name.lstrip("-") for name in theirs if re.fullmatch(r"-*\w+", name)):
        if name in SMALL or name == "output_dir":  # it is ours as well
            continue
        with pytest.raises(RecipeError) as caught:
            recipe_from_dict({**SMALL, name: 1})
        assert any(f"{key}" in str(caught.value) for key in keys), f"{name}: {caught.value}"


def _keys(setting: str) -> list[str]:
    """Return the dotted keys of a setting: `data.train: [{path: a, max_rows: 2}]` is about data.train.0.max_rows."""
    key, _, text = setting.partition(": ")
    value = read_yaml(text)[0]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [
            *(f"{key}.0.{name}" for name in value[0] if name != "path"),
            *([key] if set(value[0]) == {"path"} else []),
        ]
    return [f"{key}.{name}" for name in value] if isinstance(value, dict) and "." not in key else [key]


@pytest.mark.parametrize("number", range(3))
def test_the_translated_examples_are_recipes(number, tmp_path):
    examples = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "recipe.yaml").write_text(examples[number])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.path == "Qwen/Qwen3-VL-4B-Instruct"
