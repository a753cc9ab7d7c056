from pathlib import Path

import pytest
import torch

from qwen3vl_train.config import Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.parallel import ddp
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks

# Float32 sums of several packs come out in another order on two ranks: 2e-7 seen in losses, 1e-6 in weights.
TOLERANCE = 1e-5


def _sum(rank: int, world_size: int) -> list[torch.Tensor]:
    gradients = [torch.full((2, 3), 1.0 + rank), torch.full((4,), 10.0 * rank), torch.tensor(0.5)]
    ddp.Replicated(world_size).sum_gradients(gradients)
    return gradients


@pytest.mark.parametrize("bucket", [1, 7, 2**24])
def test_gradients_are_summed_in_place_whatever_the_bucket(bucket):
    faults.set_gradient_bucket(bucket)
    for gradients in run_ranks(_sum, 2):
        expected = [torch.full((2, 3), 3.0), torch.full((4,), 10.0), torch.tensor(1.0)]
        assert all(torch.equal(got, wanted) for got, wanted in zip(gradients, expected, strict=True))


def test_one_process_keeps_its_gradients():
    gradients = [torch.ones(3)]
    ddp.Replicated(1).sum_gradients(gradients)
    assert torch.equal(gradients[0], torch.ones(3))


def _compare(rank: int, world_size: int) -> list[bool]:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    same = ddp.same_on_all_ranks([one, two], world_size)
    changed = ddp.same_on_all_ranks([one, two + (1e-6 if rank else 0)], world_size)
    swapped = ddp.same_on_all_ranks([one, two] if rank else [two, one], world_size)
    return [same, changed, swapped]


def test_weights_that_differ_between_ranks_are_seen_by_all():
    assert run_ranks(_compare, 2) == [[True, False, False]] * 2


@pytest.mark.parametrize("tune", [small_runs.FULL, small_runs.LORA], ids=["full", "lora-dropout"])
@pytest.mark.parametrize("packs_per_step", [2, 4])
def test_two_ranks_equal_one_process(tiny_folder: Path, task: Path, tmp_path: Path, tune: dict, packs_per_step: int):
    def recipe(name: str) -> Recipe:
        return small_runs.make_recipe(
            tiny_folder,
            task,
            tmp_path / name,
            tune=tune,
            data__max_tokens_per_pack=72,
            train={"num_epochs": 2, "packs_per_step": packs_per_step},
            # The true gradient of key biases is zero; at 1e-8 Adam would make whole steps of the rounding noise there.
            optim__eps=1e-6,
        )

    one = train(recipe("one"))
    run_ranks(small_runs.train_on_rank, 2, recipe("two"))
    two = tmp_path / "two" / "run"
    assert small_runs.losses(two) == pytest.approx(small_runs.losses(one), abs=TOLERANCE)
    weights = small_runs.final_tensors(one)
    assert small_runs.largest_difference(small_runs.final_tensors(two), weights) < TOLERANCE


def _patches_of_packs(rank: int, world_size: int, recipe: Recipe) -> list[list[int]]:
    loader = open_data(recipe, Ranks(rank, world_size, rank, torch.device("cpu"))).loader
    return [[pack.num_patches for pack in step.packs] for step in loader]


def test_the_ranks_of_that_run_have_uneven_work(tiny_folder: Path, task: Path, tmp_path: Path):
    """What makes the test above worth something: a rank without a picture, and one without a pack."""
    recipe = small_runs.make_recipe(
        tiny_folder, task, tmp_path, data__max_tokens_per_pack=72, train={"num_epochs": 1, "packs_per_step": 2}
    )
    patches = run_ranks(_patches_of_packs, 2, recipe)
    assert len(patches[0]) == len(patches[1]) == 3
    steps = list(zip(*patches, strict=True))
    assert any(sum(one) > 0 and two == [0] for one, two in steps)
    assert [len(share) for share in steps[-1]] == [1, 0]


def _train_from_other_adapters(rank: int, world_size: int, recipes: list[Recipe]) -> str:
    return message_of(RuntimeError, train, recipes[rank])


def test_ranks_that_start_from_different_weights_are_stopped(tiny_folder: Path, task: Path, tmp_path: Path):
    recipes = [
        small_runs.make_recipe(tiny_folder, task, tmp_path, tune=small_runs.LORA, train__seed=seed) for seed in (0, 1)
    ]
    message = "ranks start from different weights; do they read the same model folder and checkpoint?"
    assert run_ranks(_train_from_other_adapters, 2, recipes) == [message] * 2
    assert not (tmp_path / "run").exists()
