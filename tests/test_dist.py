import random

import numpy
import pytest
import tiny
import torch

from qwen3vl_train.dist import Ranks, seed_everything, start_ranks, stop_ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_one_process_is_a_world_of_one_without_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    assert ALONE.sum([0.1, 2.0]) == [0.1, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    ALONE.barrier()
    stop_ranks()


def _exchange(rank: int, world_size: int) -> tuple:
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (rank, world_size, rank)
    assert ranks.is_main == (rank == 0)
    # 2^40 + rank and a third are exact only in float64; float32 would lose both.
    sums = ranks.sum([2.0**40 + rank, 1 / 3])
    gathered = ranks.gather(["row", rank])
    ranks.barrier()
    stop_ranks()
    stop_ranks()  # safe twice
    return sums, gathered, torch.distributed.is_initialized()


def test_ranks_sum_and_gather_on_every_rank():
    expected = ([2.0**41 + 1, 2 / 3], [["row", 0], ["row", 1]], False)
    assert tiny.run_ranks(_exchange, 2) == [expected, expected]


def _numbers() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), torch.rand(()).item()


def test_a_seed_fixes_python_numpy_and_torch():
    seed_everything(3, 7)
    first = _numbers()
    seed_everything(3, 7)
    assert _numbers() == first


@pytest.mark.parametrize("parts", [(7, 3), (3,), (3, 8), (3, 7, 0), (3 + 2**32, 7), (3 + 7 * 2**32,)])
def test_other_parts_give_other_numbers(parts):
    seed_everything(3, 7)
    first = _numbers()
    seed_everything(*parts)
    assert all(other != one for other, one in zip(_numbers(), first, strict=True))
