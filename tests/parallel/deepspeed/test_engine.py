"""ZeRO 1, 2 and 3 train as one process does, and hand their state to other engines and back."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.config import Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import full_tensor
from qwen3vl_train.parallel.deepspeed.engine import start_deepspeed
from qwen3vl_train.train.build import build_engine, build_model
from qwen3vl_train.train.tune import report_groups
from tests.helpers import engine_runs, small_runs
from tests.helpers.engine_runs import (
    FULL,
    LORA,
    TUNES,
    EngineRun,
    Steps,
    Trainee,
    engine_recipe,
    run_engine,
    run_engines,
)
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fast_zero_steps")
STAGES = (1, 2, 3)
# Before it lets a parameter go, stage 3 looks this far ahead for its next use. With DeepSpeed's 1e9 that is, for every
# module, all that is left of a tiny model: a quarter of the time of these tests.
NEAR = {"stage3_max_reuse_distance": 1000}
# Everything in many small parts: no parameter stays gathered, several buckets and sub-groups.
PARTS = {
    "zero_optimization": {
        **NEAR,
        "reduce_bucket_size": 5000,
        "allgather_bucket_size": 5000,
        "sub_group_size": 20_000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 0,
    }
}


def _recipe(checkpoint: Path, tune: dict, engine: str = "single", *, parts: bool = False, **fields) -> Recipe:
    """parts: cut up as PARTS says."""
    if engine == "deepspeed":
        file = checkpoint.parent / f"parts-{parts}.json"
        file.write_text(json.dumps(PARTS if parts else {"zero_optimization": NEAR}))
        fields["deepspeed_config"] = str(file)
    # Stage 3 adds gradients in another order. In a LoRA B, which starts at zero, some elements have a gradient as small
    # as Adam's eps, and Adam's division makes steps of its rounding: 3e-5 of the tensor at an eps of 1e-6, 7e-6 at
    # 1e-5, 4e-6 at 1e-4, while the norms of the gradients differ by no more than 7e-7. The test below shows as much
    # without DeepSpeed.
    return engine_recipe(checkpoint, tune, engine, optim={"eps": 1e-4}, **fields)


def _disturbed(recipe: Recipe, steps: Steps, noise: float) -> EngineRun:
    """One process; before each step, noise times the largest gradient of a tensor is added to all of that tensor."""
    trainee = Trainee(0, 1, recipe)
    generator = torch.Generator().manual_seed(0)
    optimizer: Any = trainee.optimizer
    norms = optimizer.gradient_norms

    def gradient_norms() -> dict[str, float]:
        for item in optimizer.trained:
            gradient = item.master.grad
            if gradient is not None and noise:
                gradient.add_(noise * gradient.abs().max() * torch.randn(gradient.shape, generator=generator))
        return norms()

    optimizer.gradient_norms = gradient_norms
    done = [trainee.step(step, packs) for step, packs in enumerate(steps)]
    weights = {name: parameter.detach().clone() for name, parameter in trainee.model.named_parameters()}
    return EngineRun([d.loss for d in done], [d.grad_norms for d in done], weights)


def test_small_eps_in_adam_amplifies_rounding(small: Path, steps: Steps):
    """Why these tests have an eps of 1e-4: one process differs from itself once gradients are rounded otherwise."""
    found = {}
    for eps in (1e-6, 1e-4):
        recipe = engine_recipe(small, LORA, optim={"eps": eps})
        found[eps] = engine_runs.difference(_disturbed(recipe, steps, 2**-23), _disturbed(recipe, steps, 0.0))
        print(f"one process, gradients off by 2**-23 of the largest, eps {eps:g}: {found[eps]}")
        assert max(found[eps].loss, found[eps].norm) < 2e-6
    assert found[1e-6].weight > 1e-5  # 2.7e-5 seen
    assert found[1e-4].weight < 5e-6  # 3.7e-6 seen


def _on_ranks(recipes: list[Recipe], steps: Steps, world_size: int = 2) -> list[EngineRun]:
    of_ranks = run_ranks(run_engines, world_size, recipes, steps)
    for results in zip(*of_ranks, strict=True):
        assert all(result.losses == results[0].losses for result in results)
    return of_ranks[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_one_process_does(stage: int, small: Path, steps: Steps):
    alone = {name: run_engine(0, 1, _recipe(small, tune), steps) for name, tune in TUNES.items()}
    cases = [(tune, kept) for tune in TUNES for kept in ("none", "full")]
    recipes = [
        _recipe(small, TUNES[tune], "deepspeed", zero_stage=stage, activation_checkpointing=kept, parts=kept == "full")
        for tune, kept in cases
    ]
    wrong = []
    for (tune, kept), result in zip(cases, _on_ranks(recipes, steps), strict=True):
        found = engine_runs.difference(result, alone[tune])
        print(f"zero {stage} {tune:14} {kept:5} {found}")
        # Float32 sums in another order: 2e-7 seen in losses, 4e-6 in weights. A missing pack shows at 1e-2.
        if found.largest > 1e-5:
            wrong.append(f"{tune}, checkpointing {kept}: {found}")
    assert not wrong, "\n".join([f"stage {stage} differs from one process", *wrong])


def test_four_ranks_an_untied_head_dora_modules_and_rows(tmp_path: Path):
    untied = engine_runs.write_small_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    steps = engine_runs.make_steps(untied)[:2]
    cases = [(FULL, 2), ({**LORA, "dora": True}, 3), (small_runs.MIXED, 1), (small_runs.MIXED, 3)]
    cases += [(small_runs.ROWS, 1), (small_runs.ROWS, 3)]
    expected = [run_engine(0, 1, _recipe(untied, tune), steps) for tune, _ in cases]
    recipes = [_recipe(untied, tune, "deepspeed", zero_stage=stage, parts=True) for tune, stage in cases]
    for (_, stage), result, alone in zip(cases, _on_ranks(recipes, steps, world_size=4), expected, strict=True):
        assert engine_runs.difference(result, alone).largest < 1e-5, stage


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_as_in_one_process(stage: int, small: Path, steps: Steps):
    cases = [("full", False), ("lora", False), ("frozen-vision", False), ("frozen-vision", True)]
    recipes = [
        _recipe(small, TUNES[tune], "deepspeed", zero_stage=stage, dtype="bfloat16", offload_optimizer=offload)
        for tune, offload in cases
    ]
    for (tune, offload), result in zip(cases, _on_ranks(recipes, steps), strict=True):
        alone = _recipe(small, TUNES[tune], dtype="bfloat16")
        start, expected = run_engine(0, 1, alone, []).weights, run_engine(0, 1, alone, steps)
        apart = {name: result.weights[name].float() - weight.float() for name, weight in expected.weights.items()}
        if stage < 3 or tune == "frozen-vision":
            # Gradients are summed and applied in float32 on both sides; the rounded weights come out the same.
            assert result.losses == expected.losses, (tune, offload)
            assert engine_runs.norm_of(apart) == 0.0
            continue
        # Where a vision block feeds the next block and a DeepStack merger, autograd adds three bfloat16 gradients, and
        # the hooks of stage 3 change which two come first. The forward pass is the same to the bit.
        moved = {name: weight.float() - start[name].float() for name, weight in expected.weights.items()}
        assert result.losses[0] == expected.losses[0]
        assert result.losses == pytest.approx(expected.losses, rel=2e-3)
        assert engine_runs.norm_of(apart) < 0.08 * engine_runs.norm_of(moved)


def test_offloaded_state_trains_as_on_the_device(small: Path, steps: Steps):
    expected = {tune: run_engine(0, 1, _recipe(small, TUNES[tune]), steps) for tune in ("full", "lora")}
    everything = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True, "parts": True}
    cases = [
        ("full", {"zero_stage": 1, "offload_optimizer": True}),
        ("lora", {"zero_stage": 2, "offload_optimizer": True, "parts": True}),
        ("full", {"zero_stage": 3, "offload_parameters": True}),
        ("full", everything),
        ("lora", everything),
    ]
    recipes = [_recipe(small, TUNES[tune], "deepspeed", **fields) for tune, fields in cases]
    for (tune, fields), result in zip(cases, _on_ranks(recipes, steps), strict=True):
        assert engine_runs.difference(result, expected[tune]).largest < 1e-5, (tune, fields)


def _hand_over(rank: int, world_size: int, recipes: list[Recipe], steps: Steps, state: dict[str, Tensor], done: int):
    """Take the state over `done` steps in, train one more step; returns what came out of both, and the loss."""
    results = []
    for recipe in recipes:
        trainee = Trainee(rank, world_size, recipe)
        if state:
            trainee.load(state, done)
        taken = trainee.state()
        weights = engine_runs.full_tensors(dict(trainee.model.named_parameters()))
        losses = trainee.steps(steps, done, done + 1)
        after = trainee.state()  # on every rank: it gathers
        results.append((taken, weights, losses, after) if rank == 0 else None)
    return results


@pytest.mark.parametrize("tune", TUNES)
def test_state_moves_from_fsdp2_through_all_stages(tune: str, small: Path, steps: Steps):
    straight = Trainee(0, 1, _recipe(small, TUNES[tune]))
    expected = straight.steps(steps, 0, 5)
    sharded = _recipe(small, TUNES[tune], "fsdp2")
    ((_, _, losses, state),) = run_ranks(_hand_over, 2, [sharded], steps, {}, 0)[0]
    fields = [{"zero_stage": stage} for stage in STAGES] + [{"zero_stage": 3, "parts": True}]
    recipes = [_recipe(small, TUNES[tune], "deepspeed", **of_case) for of_case in fields]
    for number, of_case in enumerate(run_ranks(_hand_over, 2, recipes, steps, state, 1)[0]):
        taken, weights, more, after = of_case
        small_runs.assert_same_tensors(taken, state)
        for name, tensor in state.items():
            if name.startswith("weight/"):
                assert torch.equal(weights[name.removeprefix("weight/")], tensor), (number, name)
        alone = Trainee(0, 1, _recipe(small, TUNES[tune]))
        alone.load(after, 2)
        found = [*losses, *more, *alone.steps(steps, 2, 5)]
        assert found == pytest.approx(expected, rel=1e-5), fields[number]


def _bfloat16_state(rank: int, world_size: int, recipes: list[Recipe], steps: Steps) -> None:
    for recipe in recipes:
        first, second = Trainee(rank, world_size, recipe), Trainee(rank, world_size, recipe)
        first.steps(steps, 0, 2)
        state = first.state()
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        second.load(state, 2)
        assert first.steps(steps, 2, 4) == second.steps(steps, 2, 4)
        small_runs.assert_same_tensors(second.state(), first.state())


def test_a_bfloat16_run_resumes_bit_for_bit(small: Path, steps: Steps):
    fields = [{"zero_stage": stage} for stage in STAGES] + [{"zero_stage": 2, "offload_optimizer": True}]
    recipes = [_recipe(small, FULL, "deepspeed", dtype="bfloat16", **of_case) for of_case in fields]
    run_ranks(_bfloat16_state, 2, recipes, steps)


def test_a_non_finite_step_changes_nothing(small: Path, steps: Steps):
    ((message, losses),) = engine_runs.poisoned(0, 1, [_recipe(small, FULL)], steps)
    fields = [{"zero_stage": stage} for stage in STAGES]
    fields += [{"zero_stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    # bfloat16 in stage 1 is a class of its own.
    fields.append({"zero_stage": 1, "dtype": "bfloat16"})
    recipes = [_recipe(small, FULL, "deepspeed", **of_case) for of_case in fields]
    for of_rank in run_ranks(engine_runs.poisoned, 2, recipes, steps):
        for recipe, (got, more) in zip(recipes, of_rank, strict=True):
            assert got == message
            assert more == pytest.approx(losses, rel=1e-5 if recipe.model.dtype == "float32" else 2e-2)


def test_a_step_in_which_no_rank_has_a_pack_changes_nothing(small: Path, steps: Steps):
    (expected,) = engine_runs.skipped(0, 1, [_recipe(small, FULL)], steps)
    fields = [{"zero_stage": stage} for stage in STAGES] + [{"zero_stage": 1, "dtype": "bfloat16"}]
    recipes = [_recipe(small, FULL, "deepspeed", **of_case) for of_case in fields]
    for recipe, losses in zip(recipes, run_ranks(engine_runs.skipped, 2, recipes, steps)[0], strict=True):
        assert losses == pytest.approx(expected, rel=1e-5 if recipe.model.dtype == "float32" else 2e-2)


def _cut_up(rank: int, world_size: int, recipe: Recipe) -> tuple[list, int, int]:
    trainee = Trainee(rank, world_size, recipe)
    parameters = list(trainee.model.parameters())
    held = sum(parameter.ds_tensor.numel() for parameter in parameters)
    assert all(parameter.numel() == 0 for parameter in parameters)
    return report_groups(trainee.model, recipe), held, len(parameters)


def test_stage_3_holds_a_partition_and_reports_all(small: Path):
    recipe = _recipe(small, LORA, "deepspeed", zero_stage=3, parts=True)
    model = build_model(recipe, device="cpu")
    total = sum(parameter.numel() for parameter in model.parameters())
    for groups, held, num_parameters in run_ranks(_cut_up, 2, recipe):
        assert groups == report_groups(model, recipe)
        assert total / 2 <= held <= total / 2 + num_parameters  # padding: at most one element each


def _read_by_rank_0(rank: int, world_size: int, recipe: Recipe) -> dict[str, Tensor]:
    from qwen3vl_train.parallel.deepspeed.config import deepspeed_config
    from qwen3vl_train.parallel.deepspeed.internals import fill_partitioned

    start_deepspeed(Ranks(rank, world_size, rank, torch.device("cpu")))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5))
        model[1].weight = model[0].weight

    def value(name: str, parameter: torch.nn.Parameter) -> Tensor:
        assert rank == 0
        return torch.arange(float(parameter.numel())).view(parameter.shape) + len(name)

    fill_partitioned(deepspeed_config(recipe, world_size), model, value, "cpu")
    assert model[1].weight is model[0].weight
    return {name: full_tensor(parameter) for name, parameter in model.named_parameters()}


def test_rank_0_reads_and_the_others_are_sent_their_share(small: Path):
    recipe = _recipe(small, FULL, "deepspeed", zero_stage=3)
    for tensors in run_ranks(_read_by_rank_0, 2, recipe):
        assert torch.equal(tensors["0.weight"], torch.arange(15.0).view(5, 3) + 8)
        assert torch.equal(tensors["1.bias"], torch.arange(5.0) + 6)
        assert set(tensors) == {"0.weight", "0.bias", "1.bias"}


def _untied(rank: int, world_size: int, recipe: Recipe) -> str:
    return message_of(ValueError, build_engine, recipe, Ranks(rank, world_size, rank, torch.device("cpu")))


def test_an_untied_stored_head_is_refused_on_every_rank(small: Path, tmp_path: Path):
    folder = shutil.copytree(small, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = embedding + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = _recipe(folder, FULL, "deepspeed", zero_stage=3)
    for message in run_ranks(_untied, 2, recipe):
        assert "lm_head.weight differs from embed_tokens.weight" in message


def test_one_process_needs_no_launcher(small: Path, steps: Steps):
    expected = run_engine(0, 1, _recipe(small, LORA), steps[:2])

    def train() -> None:
        assert not dist.is_initialized()
        for stage in STAGES:
            result = run_engine(0, 1, _recipe(small, LORA, "deepspeed", zero_stage=stage), steps[:2])
            assert engine_runs.difference(result, expected).largest < 1e-5

    assert small_runs.in_child(train) == 0


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert message_of(ValueError, start_deepspeed, small_runs.ALONE) == (
        "parallel.engine: deepspeed is not installed; pip install 'qwen3vl_train[deepspeed]' or take another engine"
    )
