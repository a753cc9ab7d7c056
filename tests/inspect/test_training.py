"""Rows and packs are those of training; of streams, the first rows are judged as those of indexed files are."""

import pytest
import torch

from qwen3vl_train.data.open import open_collator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.inspect.page import render_page
from qwen3vl_train.inspect.recipe import inspect_recipe
from qwen3vl_train.inspect.training import open_held_out, open_training
from qwen3vl_train.train.data import open_data
from tests.helpers import finding_rows as rows
from tests.helpers.finding_rows import finding_rows_recipe


@pytest.mark.parametrize(
    ("train", "limits"),
    [
        ({"num_epochs": 3, "packs_per_step": 3, "seed": 5}, {}),
        ({"num_steps": 7}, {"max_tokens_per_pack": 300, "max_sequences_per_pack": 2, "max_patches_per_pack": 64}),
        (
            {"num_epochs": 1},
            {"max_tokens_per_sample": 90, "too_long": "shrink_media", "max_visual_tokens_per_image": 9},
        ),
    ],
)
def test_packs_and_held_out_files_are_those_of_training(tiny_folder, data_folder, recipe, train, limits):
    data = {**recipe.data.model_dump(), "max_patches_per_pack": None, **limits}
    changed = finding_rows_recipe(tiny_folder, data_folder, data=data, train=train)
    theirs = open_data(changed, Ranks(0, 1, 0, torch.device("cpu")))
    collate = open_collator(changed)
    training = open_training(changed, collate, None)
    assert training.packs == [pack.rows for pack in theirs.loader.epoch_packs(0)]
    assert training.num_steps == theirs.num_steps
    assert (training.weights, training.index.digest()) == (theirs.loader.producer.weights, theirs.index.digest())
    held_out = open_held_out(changed, collate)
    assert [(index.digest(), [file.name for file in files]) for index, files in held_out] == [
        (index.digest(), [file.name for file in files]) for index, files in theirs.files[1:]
    ]


def streaming(model, folder, **changes):
    train = [
        {"path": str(folder / "train.jsonl"), "streaming": True, "name": "streamed"},
        {"path": str(folder / "text.jsonl"), "weight": 2.0},
    ]
    data = {
        "train": train,
        "eval": [{"path": str(folder / "eval.jsonl")}],
        "max_tokens_per_pack": 512,
        "max_visual_tokens_per_image": 24,
        "min_visual_tokens_per_image": 4,
        "num_workers": 0,
        **changes,
    }
    return finding_rows_recipe(model, folder, data=data, train={"num_steps": 7, "packs_per_step": 2})


@pytest.fixture(scope="module")
def streamed(tiny_folder, data_folder):
    return inspect_recipe(streaming(tiny_folder, data_folder), num_samples=50)


def test_stream_has_the_facts_of_its_file(streamed, inspection):
    first, indexed = streamed.facts.sources[0], inspection.facts.sources[0]
    assert (first.name, first.rows, first.usable, first.rejected) == ("streamed", 19, 15, 4)
    for same in ("tokens", "visual_tokens", "label_tokens", "formats", "histograms", "rejects", "nothing_to_learn"):
        assert getattr(first, same) == getattr(indexed, same), same
    assert [one.role for one in streamed.facts.sources] == ["train", "train", "eval"]
    assert [one.weight for one in streamed.facts.sources] == [1.0, 2.0, 1.0]
    rows_by_check = {finding.check: finding.rows for finding in streamed.facts.findings}
    assert rows_by_check["boxes_pixel"] == [str(rows.PIXEL)]
    assert rows_by_check["leak"] == ["1"]
    assert {sample["id"] for sample in streamed.samples} >= {"streamed:train.jsonl:1", "text.jsonl:1", "eval.jsonl:2"}


def test_streamed_epoch_has_no_known_length(streamed):
    packs = streamed.facts.packs
    assert (packs.streamed, packs.steps_per_epoch, packs.num_steps) == (True, None, 7)
    assert packs.histograms["sequences"].total == 15 + 8
    assert len(streamed.pack["sequences"]) > 1
    assert '"steps_per_epoch":null' in render_page(streamed)


def test_reads_one_window_and_no_more(tiny_folder, data_folder):
    few = inspect_recipe(streaming(tiny_folder, data_folder, stream_window=5), num_samples=0)
    assert [one.rows for one in few.facts.sources] == [5, 5, 2]
    fewer = inspect_recipe(streaming(tiny_folder, data_folder), num_samples=0, max_rows=2)
    assert [one.rows for one in fewer.facts.sources] == [2, 2, 2]
