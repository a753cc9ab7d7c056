import random
import time
from datetime import timedelta

import numpy
import pytest
import torch

from qwen3vl_train.dist.ranks import Board, Ranks, seed_everything
from qwen3vl_train.dist.rendezvous import start_ranks, stop_ranks
from tests.helpers.ranks import run_ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_one_process_is_a_world_of_one_without_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    assert ALONE.sum([0.1, 2.0]) == [0.1, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.maxima([-0.1, 2.0]) == [-0.1, 2.0]
    assert ALONE.agree("anything")
    assert ALONE.everywhere(lambda: 5) == 5
    ALONE.beat()
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
    assert run_ranks(_exchange, 2) == [expected, expected]


def _compare(rank: int, world_size: int) -> tuple:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    highest = ranks.maxima([float(rank), -float(rank), 2.0**48 - rank])
    return highest, ranks.agree("the same"), ranks.agree(f"of rank {min(rank, 1)}")


def test_ranks_find_the_largest_numbers_and_whether_they_hold_the_same():
    assert run_ranks(_compare, 3) == [([2.0, 0.0, 2.0**48], True, False)] * 3


def _faults(rank: int, world_size: int) -> list[str]:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    told = []

    def fail(fault: Exception) -> None:
        raise fault

    faults = [ValueError("mend"), RuntimeError("a worker died"), FileNotFoundError(2, "No such file", "a"), KeyError(7)]
    for fault in faults:
        with pytest.raises(Exception) as caught:
            ranks.from_main(lambda fault=fault: fail(fault))
        told.append(f"{type(caught.value).__name__}: {caught.value}")
    for failing in ({1}, {0, 1, 2}, {0, 2}):
        with pytest.raises(ValueError) as caught:
            ranks.everywhere(lambda failing=failing: fail(ValueError(f"mine {rank}")) if rank in failing else "well")
        told.append(str(caught.value))
    assert ranks.from_main(lambda: "still together") == "still together"
    assert ranks.everywhere(lambda: rank) == rank
    return told


def test_what_fails_on_one_rank_is_raised_on_all():
    first, second, third = run_ranks(_faults, 3)
    of_main = ["ValueError: mend", "RuntimeError: a worker died"]
    assert first == [
        *of_main, "FileNotFoundError: [Errno 2] No such file: 'a'", "KeyError: 7", "rank 1: mine 1", "mine 0", "mine 0",
    ]  # fmt: skip
    others = [*of_main, "OSError: [Errno 2] No such file: 'a'", "RuntimeError: KeyError: 7"]
    assert second == [*others, "mine 1", "mine 1", "rank 0 and 1 more: mine 0"]
    assert third == [*others, "rank 1: mine 1", "mine 2", "mine 2"]


def _long_work(rank: int, world_size: int, rendezvous: str, beats: bool) -> tuple[str, float]:
    torch.distributed.destroy_process_group()  # the harness waits too long; this timeout is what is tested
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=2)
    )
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))

    def work() -> str:
        for _ in range(25):
            time.sleep(0.2)
            if beats:
                ranks.beat()
        return "done"

    started = time.monotonic()
    try:
        return ranks.from_main(work), 0.0
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    finally:
        torch.distributed.destroy_process_group()


def test_the_others_wait_for_long_work_of_rank_0_while_it_goes_on(tmp_path):
    assert run_ranks(_long_work, 2, str(tmp_path / "a"), True) == [("done", 0.0)] * 2
    _, (told, seconds) = run_ranks(_long_work, 2, str(tmp_path / "b"), False)
    assert told == "timed out: rank 0 has given no sign for 2 s; look for its error"
    assert 2.0 <= seconds < 4.5  # not the 5 s that the work takes


def _notes(rank: int, world_size: int) -> tuple:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    boards = [Board(ranks), Board(ranks)]
    notes = [{"rows": list(range(5000)), "text": "größer \udc80"}, ["second"], {"board": 2}]
    if rank == 0:
        for key, note in zip("ab", notes, strict=False):
            boards[0].write(key, note)
        boards[1].write("a", notes[2])
        read = notes  # and it has waited for nobody
    else:
        if rank == 1:
            time.sleep(0.3)
        read = [boards[0].read("a"), boards[0].read("b"), boards[1].read("a")]
    ranks.barrier()
    store = torch.distributed.distributed_c10d._get_default_store()
    return read == notes, [store.check([f"board/{board}/{key}"]) for board, key in ((1, "a"), (1, "b"), (2, "a"))]


def test_notes_of_rank_0_reach_every_rank_and_are_gone_once_all_have_read_them():
    assert run_ranks(_notes, 3) == [(True, [False] * 3)] * 3


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
