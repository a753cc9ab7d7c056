"""The command: page, JSON, terminal; errors without a traceback."""

import json

import pytest

from qwen3vl_train.config import save_recipe
from qwen3vl_train.inspect.cli import inspect_data


@pytest.fixture
def recipe_file(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    save_recipe(recipe, file)
    return str(file)


def test_writes_page_and_facts(recipe_file, inspection, tmp_path, capsys):
    page, facts = tmp_path / "deep" / "page.html", tmp_path / "facts.json"
    assert inspect_data([recipe_file, "--out", str(page), "--json", str(facts), "--samples", "2"]) == 0
    assert json.loads(facts.read_text()) == json.loads(json.dumps(inspection.facts.to_json()))
    assert page.read_text().startswith("<!doctype html>")
    assert f"{page}: open it in a browser" in capsys.readouterr().out


def test_page_is_named_after_the_recipe_and_overrides_hold(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect_data([recipe_file, "name=other", "--samples", "0", "--rows", "1"]) == 0
    assert (tmp_path / "other-data.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "-1"], "--samples: got -1; use 0 or more"),
        (["--rows", "-5"], "--rows: got -5; use 0 or more"),
        (["data.num_workers=x"], "data.num_workers"),
    ],
)
def test_wrong_arguments_are_explained(recipe_file, arguments, said, capsys):
    assert inspect_data([recipe_file, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
