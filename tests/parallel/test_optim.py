from typing import Any

import pytest
import torch
from torch import nn

from qwen3vl_train.config import OptimSection
from qwen3vl_train.modules import group_of
from qwen3vl_train.parallel.ddp import Replicated
from qwen3vl_train.parallel.optim import MasterAdamW
from qwen3vl_train.train.step import lr_factor
from tests.helpers import small_runs
from tests.helpers.small_runs import ONE_IMAGE, Trainee


def _factors(num_steps: int = 5, **optim: Any) -> list[float]:
    return [lr_factor(step, num_steps=num_steps, optim=OptimSection(**optim)) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 3, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [0.5, 1, 0.75, 0.5, 0.25]),
        ("linear", 0.2, [0.5, 1, 0.75, 0.5, 0.25]),
        ("linear", 0.01, [0.5, 1, 0.75, 0.5, 0.25]),  # a share is rounded up to whole steps
        # (1 + cos(pi * x)) / 2 at x = 0, 1/4, 1/2, 3/4
        ("cosine", 1, [0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        # A run shorter than its warm-up only rises, and never divides by zero.
        ("cosine", 9, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("linear", 5, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]),
        ("wsd", 9, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_schedules(schedule, warmup, expected):
    assert _factors(schedule=schedule, warmup=warmup) == pytest.approx(expected, abs=1e-15)


def test_wsd_is_constant_until_its_last_share():
    falling = [1, 0.75, 0.5, 0.25]
    assert _factors(10, schedule="wsd", warmup=1, decay_share=0.4) == pytest.approx([0.5, *[1] * 5, *falling])
    assert _factors(5, schedule="wsd", warmup=1, decay_share=1.0) == pytest.approx([0.5, *falling])  # after the warm-up


@pytest.mark.parametrize(
    ("schedule", "without_min_lr"),
    [("linear", [1, 0.75, 0.5, 0.25]), ("wsd", [1, 1, 1, 0.5]), ("cosine", [1, 0.8535533905932737, 0.5, 0.146446609])],
)
def test_rates_fall_to_min_lr(schedule, without_min_lr):
    share = {"decay_share": 0.5} if schedule == "wsd" else {}
    got = _factors(4, schedule=schedule, lr=1e-3, min_lr=1e-4, **share)
    assert got == pytest.approx([0.1 + 0.9 * factor for factor in without_min_lr])


def _with_gradients(trainee: Trainee, value: float) -> None:
    for item in trainee.optimizer.trained:
        item.master.grad = torch.full_like(item.master, value)


def test_each_group_has_its_own_rate(tiny_folder):
    trainee = Trainee(
        tiny_folder, optim={"lr": 1e-3, "vision_lr": 2e-3, "merger_lr": 3e-3, "deepstack_lr": 4e-3, "eps": 1e-12}
    )
    before = trainee.weights()
    _with_gradients(trainee, 1.0)
    trainee.optimizer.step(0.5, 1.0)
    rates = {"merger": 3e-3, "deepstack": 4e-3, "vision_attn": 2e-3, "vision_mlp": 2e-3, "vision_embed": 2e-3}
    for name, weight in trainee.weights().items():
        # Adam's first step under a gradient of one is the rate itself; weights of up to 1 leave 1e-7 of rounding.
        moved = before[name] - weight
        assert torch.allclose(moved, torch.full_like(moved, 0.5 * rates.get(group_of(name), 1e-3)), atol=3e-7), name


def test_weight_decay_acts_on_matrices_alone(tiny_folder):
    trainee = Trainee(tiny_folder, optim={"lr": 1e-2, "weight_decay": 0.5})
    before = trainee.weights()
    _with_gradients(trainee, 0.0)
    trainee.optimizer.step(1.0, 1.0)
    assert sorted({weight.ndim for weight in before.values()}) == [1, 2, 5]
    for name, weight in trainee.weights().items():
        kept = 1.0 - 1e-2 * 0.5 if weight.ndim > 1 else 1.0
        assert torch.allclose(weight, before[name] * kept, rtol=1e-6, atol=0), name


def _bfloat16_norm(**optim) -> tuple[nn.Parameter, MasterAdamW]:
    norm = nn.LayerNorm(4).bfloat16()
    model = nn.ModuleDict({"language_model": nn.ModuleDict({"model": nn.ModuleDict({"norm": norm})})})
    return norm.weight, MasterAdamW(model, OptimSection(**optim), Replicated(1))


def test_an_update_too_small_for_bfloat16_is_not_lost():
    weight, optimizer = _bfloat16_norm(lr=1e-4, eps=1e-12)
    master = next(item.master for item in optimizer.trained if item.parameter is weight)
    seen = []
    for _ in range(40):
        for item in optimizer.trained:
            item.master.grad = torch.ones_like(item.master)
        optimizer.step(1.0, 1.0)
        seen.append(weight[0].item())
    # Below 1 bfloat16 has steps of 1/256: forty of 1e-4 each would all be rounded away from 1.0 if added to it.
    assert seen[0] == 1.0
    assert master[0].item() == pytest.approx(1.0 - 40 * 1e-4, abs=1e-6)
    assert seen[-1] == torch.tensor(1.0 - 40 * 1e-4).bfloat16().item() < 1.0
    assert weight.dtype == torch.bfloat16


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    weight, optimizer = _bfloat16_norm()
    for factor in (1.0, *[0.001] * 8):  # each of the small ones alone vanishes beside 1 in bfloat16
        (weight.float() * factor).sum().backward()
    assert weight.grad is None
    assert optimizer.trained[0].master.grad is not None
    small = torch.tensor(0.001).bfloat16().float().item()
    assert optimizer.trained[0].master.grad.tolist() == pytest.approx([1 + 8 * small] * 4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_in_bit_for_bit(tiny_folder, task, dtype):
    pack = small_runs.packer(tiny_folder, task)(ONE_IMAGE)
    straight, stopped = Trainee(tiny_folder, dtype=dtype), Trainee(tiny_folder, dtype=dtype)
    straight.step([pack])
    state = {name: tensor.clone() for name, tensor in straight.optimizer.state_tensors().items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    into = stopped.optimizer.state_tensors()
    for name, tensor in state.items():
        into[name].copy_(tensor)
    stopped.optimizer.load_state_dict(into, num_updates=1)
    straight.step([pack], step=1)
    stopped.step([pack], step=1)
    small_runs.assert_same_tensors(stopped.optimizer.state_tensors(), straight.optimizer.state_tensors())
    small_runs.assert_same_tensors(stopped.weights(), straight.weights())


def test_nothing_to_train_is_an_error(tiny_folder):
    trainee = Trainee(tiny_folder)
    trainee.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^tune: nothing trains; name at least one module group or LoRA target$"):
        MasterAdamW(trainee.model, OptimSection(), Replicated(1))
