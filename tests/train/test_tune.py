import shutil

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.model.lora import lora_layers
from qwen3vl_train.model.new_rows import modules_with_new_rows
from qwen3vl_train.modules import group_of
from qwen3vl_train.train.build import describe
from qwen3vl_train.train.loop import train
from qwen3vl_train.train.tune import GradientCheck, report_groups
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.small_runs import ALONE, ONE_IMAGE, TEXT_ONLY, Trainee


@pytest.fixture(scope="module")
def pack(tiny_folder, task):
    return small_runs.packer(tiny_folder, task)


def _step(check: GradientCheck, trainee: Trainee, packs: list[PackedBatch], step: int = 1) -> str | None:
    """Train on the packs and check the step, counted from one."""
    return check.after_step(trainee.step(packs, step=step - 1), trainee.optimizer.params_with_grad, ALONE)


@pytest.mark.parametrize("tune", [small_runs.FULL, small_runs.LORA], ids=["full", "lora"])
def test_a_first_step_with_an_image_is_checked_once(tiny_folder, pack, tune):
    trainee = Trainee(tiny_folder, tune=tune)
    check = GradientCheck(trainee.model)
    number = 121 if tune is small_runs.FULL else 104
    expected = f"gradient check, step 1: all {number} trained tensors got a gradient, nothing else did"
    assert _step(check, trainee, [pack(ONE_IMAGE)]) == expected
    assert _step(check, trainee, [pack(ONE_IMAGE)], 2) is None


def test_a_text_only_start_is_checked_again_with_an_image(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    check = GradientCheck(trainee.model)
    assert _step(check, trainee, [pack(TEXT_ONLY)]) == (
        "gradient check, step 1: all 46 trained text tensors (no image yet) got a gradient, nothing else did"
    )
    assert _step(check, trainee, [pack(TEXT_ONLY)], 2) is None
    assert _step(check, trainee, [pack(ONE_IMAGE)], 3) == (
        "gradient check, step 3: all 121 trained tensors got a gradient, nothing else did"
    )


def test_a_step_without_a_usable_row_is_not_checked(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    check = GradientCheck(trainee.model)
    assert _step(check, trainee, []) is None
    assert "step 2: all 46 trained text tensors" in (_step(check, trainee, [pack(TEXT_ONLY)], 2) or "")


@pytest.mark.parametrize("row", [ONE_IMAGE, TEXT_ONLY])
def test_a_trained_tensor_without_a_gradient_is_named(tiny_folder, pack, row):
    trainee = Trainee(tiny_folder)
    parent = trainee.model.language_model.model.layers[1].mlp
    parent.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    check = GradientCheck(trainee.model)
    with pytest.raises(RuntimeError) as fault:
        _step(check, trainee, [pack(row)])
    assert str(fault.value) == (
        "gradient check, step 1: 1 tensors that should train got no gradient: "
        "language_model.model.layers.1.mlp.forgotten; a fault of the model code, please report it"
    )


def test_a_missing_vision_gradient_is_found_at_the_first_image(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    trainee.model.visual.vision.merger.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    check = GradientCheck(trainee.model)
    assert _step(check, trainee, [pack(TEXT_ONLY)])
    with pytest.raises(RuntimeError, match=r"step 2: 1 tensors .* no gradient: visual\.vision\.merger\.forgotten;"):
        _step(check, trainee, [pack(ONE_IMAGE)], 2)


def test_a_frozen_tensor_with_a_gradient_is_named(tiny_folder, pack):
    trainee = Trainee(tiny_folder, tune={"method": "full", "train": ["merger"]})
    check = GradientCheck(trainee.model)
    trainee.model.visual.vision.pos_embed.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"step 1: 1 frozen tensors got one: visual\.vision\.pos_embed\.weight;"):
        _step(check, trainee, [pack(ONE_IMAGE)])


def test_the_report_counts_what_trains_by_group(tiny_folder, task, tmp_path):
    values = {"tune": {"method": "full", "train": ["merger", "text"]}, "optim": {"lr": 1e-3, "merger_lr": 2e-3}}
    trainee = Trainee(tiny_folder, **values)
    reports = report_groups(trainee.model, small_runs.make_recipe(tiny_folder, task, tmp_path, **values))
    trained = {report.group: (report.num_trained_tensors, report.lr) for report in reports}
    assert trained == {
        **dict.fromkeys(("vision_attn", "vision_mlp", "vision_embed", "deepstack"), (0, 0.0)),
        "merger": (6, 2e-3),
        "text_attn": (28, 1e-3),
        "text_mlp": (16, 1e-3),
        "text_embed": (1, 1e-3),
        "lm_head": (1, 1e-3),  # the final norm: the head itself is tied to the embedding
    }
    assert sum(report.num_parameters for report in reports) == sum(p.numel() for p in trainee.model.parameters())
    num_trained = sum(item.master.numel() for item in trainee.optimizer.trained)
    assert sum(report.num_trained_parameters for report in reports) == num_trained


@pytest.mark.parametrize(
    ("pattern", "rates", "message"),
    [
        (".*self_attn.q_proj", {"vision_lr": 1e-4}, "optim.vision_lr: set, but tune.targets trains no vision_attn or "),
        (
            ".*visual.merger.linear_fc1",
            {"merger_lr": 1e-4, "deepstack_lr": 1e-4},
            "optim.deepstack_lr: set, but tune.targets trains no",
        ),
        (".*merger.*linear_fc1", {"merger_lr": 1e-4}, "optim.deepstack_lr: missing beside optim.merger_lr 0.0001"),
    ],
)
def test_a_rate_for_unmatched_patterns_is_an_error(tiny_folder, task, tmp_path, pattern, rates, message):
    values = {f"optim__{name}": rate for name, rate in rates.items()}
    tune = {"method": "lora", "rank": 2, "targets": [pattern]}
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, tune=tune, **values)
    assert message_of(ValueError, describe, Qwen3VLArch.from_pretrained(tiny_folder), recipe).startswith(message)


VISION_ALONE = {
    "full": {"method": "full", "train": ["vision_attn", "merger"]},
    "lora": {"method": "lora", "targets": ["vision"]},
}


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("kind", VISION_ALONE)
def test_vision_alone_on_text_alone_is_refused(tiny_folder, tmp_path, kind, streaming):
    path = small_runs.write_rows(
        tmp_path / "text.jsonl", [small_runs.row("A number?", "Seven."), small_runs.row("A?", "B")]
    )
    source = {"path": str(path), "streaming": streaming}
    recipe = small_runs.make_recipe(tiny_folder, tmp_path, tmp_path, tune=VISION_ALONE[kind], data__train=[source])
    named = "tune.train: only vision_attn, merger" if kind == "full" else "tune.targets: only vision_attn, vision_mlp"
    where = "none of the first 2 rows" if streaming else "none of the 2 samples"
    assert message_of(ValueError, train, recipe) == (
        f"{named} would train, but {where} of data.train has an image or clip, so nothing would be learned; "
        "add rows with media, or name a text group"
    )


def test_groups_that_no_step_reached_are_named_at_the_end(tiny_folder, task, tmp_path, capsys):
    path = small_runs.write_rows(tmp_path / "text.jsonl", [small_runs.row("A number?", "Seven.")])
    tune = {"method": "lora", "rank": 2, "targets": ["merger", "text_attn"]}
    overrides = {"tune": tune, "train__num_steps": 2}
    train(small_runs.make_recipe(tiny_folder, tmp_path, tmp_path / "a", data__train=[{"path": str(path)}], **overrides))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "warning: no row of steps 1 to 2 had an image or clip, so nothing was learned by merger (4 tensors); "
        "train them on rows with media, or not at all"
    )
    train(small_runs.make_recipe(tiny_folder, task, tmp_path / "b", **overrides))
    assert "nothing was learned" not in capsys.readouterr().out


def test_ranks_by_group_and_a_rate_for_b(tiny_folder, pack):
    tune = {
        "method": "lora",
        "targets": ["text_attn", "merger"],
        "rank": {"text_attn": 3, "merger": 2},
        "alpha": {"all": 4},
    }
    optim = {"lr": 1e-3, "lora_b_lr": 4e-3, "merger_lr": 5e-4, "eps": 1e-12}
    trainee = Trainee(tiny_folder, tune=tune, optim=optim)
    shapes = {
        name.split(".lora_")[1][0] + group_of(name): min(p.shape)
        for name, p in trainee.model.named_parameters()
        if ".lora_" in name
    }
    assert shapes == {"Atext_attn": 3, "Btext_attn": 3, "Amerger": 2, "Bmerger": 2}
    assert {layer.scaling["default"] for _, layer in lora_layers(trainee.model)} == {4 / 3, 4 / 2}
    before = trainee.weights()
    trainee.step([pack(ONE_IMAGE)])
    trainee.step([pack(ONE_IMAGE)])
    # Adam's first two steps are the rate itself where the sign of the gradient stays.
    moved = {}
    for name, weight in trainee.weights().items():
        if ".lora_" in name:
            key = name.split(".lora_")[1][0] + group_of(name)
            moved[key] = max(moved.get(key, 0.0), (weight - before[name]).abs().max().item())
    # B moves in both steps, A in the second alone: until then B is zero.
    expected = {"Atext_attn": 1e-3, "Btext_attn": 8e-3, "Amerger": 5e-4, "Bmerger": 8e-3}
    assert {key: moved[key] / rate for key, rate in expected.items()} == pytest.approx(
        dict.fromkeys(expected, 1.0), rel=0.4
    )


def test_a_pattern_that_reaches_a_group_without_a_rank(tiny_folder, task, tmp_path):
    tune = {"method": "lora", "targets": [r".*\.linear_fc1"], "rank": {"merger": 2}}
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, tune=tune)
    assert message_of(ValueError, describe, Qwen3VLArch.from_pretrained(tiny_folder), recipe) == (
        "tune.rank: has no number for vision_mlp, of which tune.targets reaches "
        "visual.vision.blocks.0.mlp.linear_fc1; add one"
    )


def test_new_tokens_are_those_that_no_released_checkpoint_has(tiny_folder, task, tmp_path):
    tune = {"method": "lora", "new_tokens": "all"}
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, tune=tune)
    add = "add them to its tokenizer with transformers, and save it there"
    arch = Qwen3VLArch.from_pretrained(tiny_folder)
    assert message_of(ValueError, describe, arch, recipe) == (
        f"tune.new_tokens: {tiny_folder} has no added token that a released Qwen3-VL does not have; {add}"
    )
    named = small_runs.make_recipe(tiny_folder, task, tmp_path, tune={**tune, "new_tokens": ["<|box_strt|>"]})
    assert message_of(ValueError, describe, arch, named) == (
        f"tune.new_tokens: {tiny_folder} has no added token <|box_strt|> (near: <|box_start|>, <|im_start|>); {add}"
    )
    folder = shutil.copytree(tiny_folder, tmp_path / "more")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<loc_1>", "<loc_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = describe(arch, small_runs.make_recipe(folder, task, tmp_path, tune=tune))
    ids = sorted(tokenizer.token_to_id(name) for name in ("<loc_0>", "<loc_1>"))
    assert {name: table.new_ids for name, table in modules_with_new_rows(model)} == {
        "language_model.model.embed_tokens": tuple(ids)
    }
