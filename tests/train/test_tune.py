import pytest
import torch
from torch import nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.train.build import describe
from qwen3vl_train.train.tune import GradientCheck, report_groups
from tests.helpers import small_runs
from tests.helpers.messages import message_of
from tests.helpers.small_runs import ALONE, ONE_IMAGE, TEXT_ONLY, Trainee


@pytest.fixture(scope="module")
def pack(tiny_folder, task):
    return small_runs.packer(tiny_folder, task)


def _check(check: GradientCheck, trainee: Trainee, step: int, *, media: bool, labels: bool = True) -> str | None:
    return check.after_step(step, trainee.optimizer.params_with_grad, with_labels=labels, with_media=media, ranks=ALONE)


@pytest.mark.parametrize("tune", [small_runs.FULL, small_runs.LORA], ids=["full", "lora"])
def test_a_first_step_with_an_image_is_checked_once(tiny_folder, pack, tune):
    trainee = Trainee(tiny_folder, tune=tune)
    check = GradientCheck(trainee.model)
    trainee.step([pack(ONE_IMAGE)])
    number = 121 if tune is small_runs.FULL else 104
    expected = f"gradient check, step 1: all {number} trained tensors got a gradient, nothing else did"
    assert _check(check, trainee, 1, media=True) == expected
    assert _check(check, trainee, 2, media=True) is None


def test_a_text_only_start_is_checked_again_with_an_image(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    check = GradientCheck(trainee.model)
    trainee.step([pack(TEXT_ONLY)])
    assert _check(check, trainee, 1, media=False) == (
        "gradient check, step 1: all 46 trained text tensors (no image yet) got a gradient, nothing else did"
    )
    trainee.step([pack(TEXT_ONLY)], step=1)
    assert _check(check, trainee, 2, media=False) is None
    trainee.step([pack(ONE_IMAGE)], step=2)
    assert _check(check, trainee, 3, media=True) == (
        "gradient check, step 3: all 121 trained tensors got a gradient, nothing else did"
    )


def test_a_step_without_a_usable_row_is_not_checked(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    check = GradientCheck(trainee.model)
    trainee.step([])
    assert _check(check, trainee, 1, media=False, labels=False) is None
    trainee.step([pack(TEXT_ONLY)], step=1)
    assert "step 2: all 46 trained text tensors" in (_check(check, trainee, 2, media=False) or "")


@pytest.mark.parametrize("row", [ONE_IMAGE, TEXT_ONLY])
def test_a_trained_tensor_without_a_gradient_is_named(tiny_folder, pack, row):
    trainee = Trainee(tiny_folder)
    parent = trainee.model.language_model.model.layers[1].mlp
    parent.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    check = GradientCheck(trainee.model)
    trainee.step([pack(row)])
    with pytest.raises(RuntimeError) as fault:
        _check(check, trainee, 1, media=row == ONE_IMAGE)
    assert str(fault.value) == (
        "gradient check, step 1: 1 tensors that should train got no gradient: "
        "language_model.model.layers.1.mlp.forgotten; a fault of the model code, please report it"
    )


def test_a_missing_vision_gradient_is_found_at_the_first_image(tiny_folder, pack):
    trainee = Trainee(tiny_folder)
    trainee.model.visual.vision.merger.register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    check = GradientCheck(trainee.model)
    trainee.step([pack(TEXT_ONLY)])
    assert _check(check, trainee, 1, media=False)
    trainee.step([pack(ONE_IMAGE)], step=1)
    with pytest.raises(RuntimeError, match=r"step 2: 1 tensors .* no gradient: visual\.vision\.merger\.forgotten;"):
        _check(check, trainee, 2, media=True)


def test_a_frozen_tensor_with_a_gradient_is_named(tiny_folder, pack):
    trainee = Trainee(tiny_folder, tune={"method": "full", "train": ["merger"]})
    check = GradientCheck(trainee.model)
    trainee.model.visual.vision.pos_embed.weight.requires_grad_(True)
    trainee.step([pack(ONE_IMAGE)])
    with pytest.raises(RuntimeError, match=r"step 1: 1 frozen tensors got one: visual\.vision\.pos_embed\.weight;"):
        _check(check, trainee, 1, media=True)


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
