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


def assert_same_facts(written, inspection):
    assert len(written.pop("samples")) == 2
    assert len(written.pop("rejects")) == 4
    assert written == json.loads(json.dumps(inspection.facts.to_json()))


def test_writes_page_and_facts(recipe_file, inspection, tmp_path, capsys):
    page, facts = tmp_path / "deep" / "page.html", tmp_path / "facts.json"
    assert inspect_data([recipe_file, "--out", str(page), "--json", str(facts), "--samples", "2"]) == 0
    assert_same_facts(json.loads(facts.read_text()), inspection)
    assert page.read_text().startswith("<!doctype html>")
    assert f"{page}: open it in a browser" in capsys.readouterr().out


def test_page_is_named_after_the_overridden_recipe(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect_data([recipe_file, "name=other", "--samples", "0", "--rows", "1"]) == 0
    assert (tmp_path / "other-data.html").exists()


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "-", "name=looked-at"]])
def test_facts_go_to_stdout_alone(recipe_file, inspection, tmp_path, capsys, arguments):
    page = tmp_path / "page.html"
    assert inspect_data([recipe_file, "--samples", "2", "--out", str(page), *arguments]) == 0
    out, err = capsys.readouterr()
    assert_same_facts(json.loads(out), inspection)
    assert f"{page}: open it in a browser" in err
    assert "packs an epoch" in err


def test_data_without_a_usable_row_is_shown(tiny_folder, tmp_path, capsys):
    from tests.helpers.small_runs import recipe_values, write_rows

    values = recipe_values(tiny_folder, tmp_path, tmp_path / "out", name="bare")
    write_rows(tmp_path / "train.jsonl", ["not json"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    page = tmp_path / "page.html"
    assert inspect_data([str(tmp_path / "recipe.yaml"), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "train.jsonl:1: not JSON" in out
    assert "no packs: no training row can be used" in out
    assert "not JSON" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "-1"], "--samples: got -1; use 0 or more"),
        (["--rows", "-5"], "--rows: got -5; use 0 or more"),
        (["data.num_workers=x"], "data.num_workers"),
        (["--json", "name=other"], "--json: got name=other; give a file, or - where an override follows"),
    ],
)
def test_wrong_arguments_are_explained(recipe_file, arguments, said, capsys):
    assert inspect_data([recipe_file, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
