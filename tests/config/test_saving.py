from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3vl_train.config import (
    RecipeError,
    check_world_size,
    load_recipe,
    public_dict,
    recipe_differences,
    run_dir,
    save_recipe,
)
from qwen3vl_train.config.yaml12 import read_yaml, write_yaml
from tests.helpers.messages import message_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_recipe_is_frozen(small):
    with pytest.raises(ValueError, match="frozen"):
        small().optim.lr = 3.0


def test_save_and_load_again(small, tmp_path):
    recipe = small(name="2024-01-01", output_dir="1e-4", optim={"lr": 2e-5, "max_grad_norm": None})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_named_like_their_files_and_survive_saving(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_urls_lose_their_secrets_when_saved(small, tmp_path):
    source = {"path": "s3://user:pass@host/a.jsonl?X-Amz-Signature=abc&part=1", "media_root": "https://ghp_x@host/i@2"}
    recipe = small(data={"train": [source]})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    saved = load_recipe(tmp_path / "recipe.yaml")
    assert saved.data.train[0].path == "s3://***@host/a.jsonl?***"
    assert saved.data.train[0].media_root == "https://***@host/i@2"
    assert saved.to_dict() == public_dict(recipe)
    assert recipe_differences(saved, recipe) == {}


def test_differences_name_what_changes_training(small):
    there = small(optim={"lr": 1e-4})
    here = small(
        name="other",
        output_dir="elsewhere",
        tune={"method": "lora", "dora": True},
        data={"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "num_workers": 0, "eval": [{"path": "e"}]},
        optim={"lr": 2e-5, "max_grad_norm": None},
        train={"activation_checkpointing": "full"},
        parallel={"engine": "single"},
        checkpoint={"every_steps": 1},
        eval={"every_steps": None},
        track={"wandb": "off"},
    )
    assert list(recipe_differences(there, here).values()) == [
        "tune.dora: false there, true here",
        "optim.lr: 0.0001 there, 2e-05 here",
        "optim.max_grad_norm: 1.0 there, null here",
        *(
            f"data.train.1.{field}: absent there, {value} here"
            for field, value in {
                "path": "b.jsonl", "media_root": "null", "name": "null", "format": "auto",
                "split": "null", "subset": "null", "max_rows": "null", "train_on": "all",
                "bbox": "null", "bbox_layout": "xyxy",
                "allow_urls": "false", "allow_private_urls": "false", "weight": "1.0",
                "streaming": "false", "num_rows": "null",
            }.items()
        ),
    ]  # fmt: skip
    assert recipe_differences(here, here) == {}


def test_paths_are_compared_by_the_place_they_lead_to(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "a.jsonl").touch()

    def recipe(model: str, rows: str = "a.jsonl", root: str = "pictures"):
        return small(model={"path": model}, data={"train": [{"path": rows, "media_root": root}]})

    there = recipe("base")
    for spelt in ("base/", "./base", str(tmp_path / "base"), "link"):
        assert recipe_differences(there, recipe(spelt, str(tmp_path / "a.jsonl"), "./pictures/")) == {}
    assert list(recipe_differences(there, recipe("other"))) == ["model.path"]
    assert list(recipe_differences(there, recipe("base", root="other"))) == ["data.train.0.media_root"]
    assert list(recipe_differences(there, small(data={"train": [{"path": "a.jsonl"}]}, model={"path": "base"}))) == [
        "data.train.0.media_root"
    ]
    assert recipe_differences(recipe("gone"), recipe("other")) == {}  # moved: its weights decide


def test_a_share_held_out_changes_training_and_held_out_files_do_not(small):
    rows = {"train": [{"path": "a.jsonl"}]}
    there = small(data={**rows, "eval": [{"path": "e.jsonl"}]})
    assert list(recipe_differences(there, small(data={**rows, "eval_share": 0.1})).values()) == [
        "data.eval_share: null there, 0.1 here"
    ]


def test_world_size(small):
    recipe = small(train={"packs_per_step": 3}, parallel={"engine": "single"})
    check_world_size(recipe, 1)
    assert message_of(RecipeError, check_world_size, recipe, 2) == (
        "recipe small: 2 errors\n"
        "  - train.packs_per_step: 3 does not divide by 2 ranks; use 2, 4 or 6\n"
        "  - parallel.engine: single, but 2 ranks were started; use ddp or start one process"
    )
    check_world_size(small(), 4)
    with pytest.raises(RecipeError, match=r"8 does not divide by 16 ranks; use 16, 32 or 48"):
        check_world_size(small(), 16)


def test_run_dir(small):
    assert run_dir(small(output_dir="out/runs")) == Path("out/runs/small")


def test_list_under_two_keys_is_written_twice():
    shared = [1, 2]
    assert read_yaml(write_yaml({"a": shared, "b": shared})) == ({"a": [1, 2], "b": [1, 2]}, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text, value):
    read, _ = read_yaml(f"key: {text}")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


@example("a\x85b")
@example("\u2028")
@given(
    st.one_of(
        st.text(),
        st.from_regex(r"[-+0-9.eExob_:~<!]{1,8}", fullmatch=True),
        st.sampled_from(["off", "yes", "null", "true", "0o7", "1e5", ".inf", "=", "<<", "2024-01-01", "1:30"]),
        st.floats(allow_nan=False),
        st.integers(),
        st.none(),
        st.booleans(),
    )
)
def test_what_is_written_reads_back_with_its_type(value):
    (read, _) = read_yaml(write_yaml({"key": value}))
    assert read == {"key": value}
    assert type(read["key"]) is type(value)
