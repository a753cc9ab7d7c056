"""What ranks exchange: sums, objects, errors, work of rank 0, and messages through the store."""

import random
import time
from pathlib import Path

import numpy
import pytest
import torch

from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast, seed_everything
from qwen3vl_train.dist.rendezvous import start_ranks, stop_ranks
from tests.helpers.ranks import join_again, run_ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


def test_one_process_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    assert ALONE.reduce([0.1, 2.0]) == ALONE.reduce([0.1, 2.0], "max") == [0.1, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert [ALONE.any(flag) for flag in (True, False)] == [True, False]
    assert ALONE.on_all(lambda: 5) == ALONE.on_main(lambda: 5) == 5
    ALONE.heartbeat()
    stop_ranks()


def _exchange(rank: int, world_size: int) -> tuple:
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (rank, world_size, rank)
    assert ranks.is_main == (rank == 0)
    # 2^40 + rank and a third are exact only in float64; float32 would lose both.
    sums = ranks.reduce([2.0**40 + rank, 1 / 3])
    largest = ranks.reduce([float(rank), -float(rank), 2.0**48 - rank], "max")
    flags = ranks.any(rank == 1), ranks.any(False)
    gathered = ranks.gather(["row", rank])
    stop_ranks()
    stop_ranks()  # safe twice
    return sums, largest, flags, gathered, torch.distributed.is_initialized()


def test_reduce_and_gather_give_every_rank_the_same():
    expected = ([2.0**41 + 1, 2 / 3], [1.0, 0.0, 2.0**48], (True, False), [["row", 0], ["row", 1]], False)
    assert run_ranks(_exchange, 2) == [expected, expected]


def _raise_errors(rank: int, world_size: int) -> list[str]:
    ranks = Ranks(rank, world_size, rank, CPU)
    raised = []

    def fail(error: Exception) -> None:
        raise error

    errors = [
        ValueError("fix it"),
        RuntimeError("a worker died"),
        FileNotFoundError(2, "No such file", "a"),
        KeyError(7),
    ]
    for error in errors:
        with pytest.raises(Exception) as caught:
            ranks.on_main(lambda error=error: fail(error))
        raised.append(f"{type(caught.value).__name__}: {caught.value}")
    for failing in ({1}, {0, 1, 2}, {0, 2}):
        with pytest.raises(ValueError) as caught:
            ranks.on_all(lambda failing=failing: fail(ValueError(f"mine {rank}")) if rank in failing else "well")
        raised.append(str(caught.value))
    assert ranks.on_main(lambda: "still together") == "still together"
    assert ranks.on_all(lambda: rank) == rank
    return raised


def test_an_error_of_one_rank_is_raised_on_all_ranks():
    first, second, third = run_ranks(_raise_errors, 3)
    of_main = ["ValueError: fix it", "RuntimeError: a worker died"]
    assert first == [
        *of_main, "FileNotFoundError: [Errno 2] No such file: 'a'", "KeyError: 7", "rank 1: mine 1", "mine 0", "mine 0",
    ]  # fmt: skip
    others = [*of_main, "OSError: [Errno 2] No such file: 'a'", "RuntimeError: KeyError: 7"]
    assert second == [*others, "mine 1", "mine 1", "rank 0 and 1 more: mine 0"]
    assert third == [*others, "rank 1: mine 1", "mine 2", "mine 2"]


def _long_work(rank: int, world_size: int, folder: Path, sends_heartbeats: bool) -> str:
    join_again(rank, world_size, folder, seconds=2)
    ranks = Ranks(rank, world_size, rank, CPU)

    def work() -> str:
        for _ in range(25):  # 5 seconds
            time.sleep(0.2)
            if sends_heartbeats:
                ranks.heartbeat()
        while not sends_heartbeats and not (folder / "gave-up").exists():
            time.sleep(0.05)
        return "done"

    try:
        return ranks.on_main(work)
    except RuntimeError as error:
        (folder / "gave-up").touch()
        return str(error)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_wait_for_rank_0_while_it_sends_heartbeats(tmp_path):
    (tmp_path / "silent").mkdir()
    assert run_ranks(_long_work, 2, tmp_path, True) == ["done"] * 2
    _, error = run_ranks(_long_work, 2, tmp_path / "silent", False)
    assert error == "timed out: rank 0 has not responded for 2 s; look for its error"


def _broadcast(rank: int, world_size: int) -> tuple:
    ranks = Ranks(rank, world_size, rank, CPU)
    first, second = StoreBroadcast(ranks), StoreBroadcast(ranks)
    messages = [{"rows": list(range(5000)), "text": "größer \udc80"}, ["second"], {"broadcast": 2}]
    if rank == 0:
        for broadcast, key, message in zip((first, first, second), "aba", messages, strict=True):
            broadcast.send(key, message)
        received = messages  # and it has waited for nobody
    else:
        if rank == 1:
            time.sleep(0.3)
        received = [first.receive("a"), first.receive("b"), second.receive("a")]
    ranks.gather(None)
    store = torch.distributed.distributed_c10d._get_default_store()
    return received == messages, [store.check([f"broadcast/{key}"]) for key in ("1/a", "1/b", "2/a")]


def test_a_broadcast_message_is_deleted_once_all_received_it():
    assert run_ranks(_broadcast, 3) == [(True, [False] * 3)] * 3


def _numbers() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), torch.rand(()).item()


def test_a_seed_fixes_python_numpy_and_torch():
    seed_everything(3, 7)
    first = _numbers()
    seed_everything(3, 7)
    assert _numbers() == first


@pytest.mark.parametrize("parts", [(7, 3), (3,), (3, 8), (3, 7, 0), (3 + 2**32, 7), (3 + 7 * 2**32,)])
def test_other_seeds_give_other_numbers(parts):
    seed_everything(3, 7)
    first = _numbers()
    seed_everything(*parts)
    assert all(other != one for other, one in zip(_numbers(), first, strict=True))
