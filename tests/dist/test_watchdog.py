"""A rank that is late is named, with the last step of every rank; nothing is named where nobody is behind."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from qwen3vl_train.dist.ranks import Ranks, await_main
from qwen3vl_train.dist.rendezvous import NCCL_SETTINGS, start_ranks, stop_ranks
from qwen3vl_train.dist.watchdog import LateRankError, RankState, Watchdog, describe, where
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def _steps(ranks: Ranks, watch: Watchdog, late: int) -> None:
    with watch:
        for step in range(1, 10):
            if step == 4 and ranks.rank == late:
                time.sleep(8)
            ranks.sum([1.0])
            watch.beat(step)


def _one_is_late(rank: int, world_size: int, late: int, rendezvous: str) -> str:
    # The process group of the test harness waits too long; the run's own timeout is what is tested.
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=5)
    )
    ranks = Ranks(rank, world_size, rank, CPU)
    told: list[str] = []
    started = time.monotonic()
    with pytest.raises(LateRankError) as caught:
        _steps(ranks, Watchdog(ranks, timeout_seconds=5, tell=told.append), late)
    took = time.monotonic() - started
    torch.distributed.destroy_process_group()
    if rank == late:  # it finds that the other has gone
        return ""
    assert 4.0 < took < 7.5, took
    # Told before the timeout as well, for NCCL, which raises nothing.
    assert told[0].splitlines()[0].endswith(str(caught.value).splitlines()[0])
    return str(caught.value)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_later_than_the_timeout_is_named_with_the_last_step_of_every_rank(late: int, tmp_path: Path):
    reports = run_ranks(_one_is_late, 2, late, str(tmp_path / "rendezvous"))
    lines = reports[1 - late].splitlines()
    assert lines[0] == f"step 4: rank {late} is late"
    assert {line.split(",")[0] for line in lines[1:3]} == {"  rank 0: last step 3", "  rank 1: last step 3"}
    assert f"  rank {1 - late}: last step 3, waiting for the others" in lines


def state(rank: int, step: int, *, waits: bool = True, place: str = "parallel/ddp.py:31 sum", silent: float = 0.0):
    return RankState(rank, step, place, waits, silent)


def _indexes(rank: int, world_size: int) -> list[str]:
    told: list[str] = []
    with Watchdog(ranks := Ranks(rank, world_size, rank, CPU), timeout_seconds=2, tell=told.append):
        for _ in range(20):
            time.sleep(0.2)
            ranks.beat()
    return told


def test_nobody_is_late_while_rank_0_goes_on_with_its_work():
    assert run_ranks(_indexes, 2) == [[], []]


def test_many_ranks_make_a_short_report():
    states = [state(rank, 7, waits=rank != 700, place="data/loader.py:88 take" if rank == 700 else "step.py:9 run")
              for rank in range(1024)]  # fmt: skip
    assert describe(states, 1024, 1800).splitlines() == [
        "step 8: rank 700 is late",
        "  ranks 0-699, 701-1023: last step 7, waiting for the others in step.py:9 run",
        "  rank 700: last step 7, at data/loader.py:88 take",
    ]


def test_a_rank_that_never_came_and_one_that_fell_silent_are_late():
    states = [state(0, 2), state(1, 2, silent=900.0), state(3, 2)]
    assert describe(states, 4, 1800).splitlines() == [
        "step 3: ranks 1-2 are late",
        "  rank 2: never heard of",
        "  ranks 0, 3: last step 2, waiting for the others in parallel/ddp.py:31 sum",
        "  rank 1: last step 2, waiting for the others in parallel/ddp.py:31 sum, silent for 900 s",
    ]


def test_the_lowest_step_is_late_also_where_nobody_is_seen_to_wait():
    # On a GPU the main thread waits for the device, which looks like any other line.
    states = [state(0, 5, waits=False), state(1, 4, waits=False)]
    assert describe(states, 2, 1800).startswith("step 5: rank 1 is late\n")


def test_no_rank_is_named_where_all_wait():
    assert describe([state(0, 5), state(1, 5)], 2, 1800).startswith("step 6: no rank is behind the others;")


def test_a_place_is_the_innermost_line_of_the_package():
    ranks = Ranks(0, 1, 0, CPU)

    class Stop(Exception):
        pass

    def look() -> None:
        raise Stop(*where(sys._getframe()))

    with pytest.raises(Stop) as caught:
        ranks.from_main(look)  # a frame of dist.py, which says nothing: everything goes through it
    assert caught.value.args == ("", False)


def test_a_rank_that_waits_for_work_of_rank_0_is_seen_to_wait():
    class Store:
        timeout = timedelta(seconds=9)

        def check(self, keys: list[str]) -> bool:
            raise LookupError(*where(sys._getframe()))

    with pytest.raises(LookupError) as caught:
        await_main(Store(), "done")
    assert caught.value.args == ("", True)


def test_errors_of_other_kinds_and_runs_of_one_pass_through():
    with pytest.raises(ValueError, match=r"^mend this$"), Watchdog(Ranks(0, 1, 0, CPU), 5.0):
        raise ValueError("mend this")


def _fails(rank: int, world_size: int) -> str:
    try:
        with Watchdog(Ranks(rank, world_size, rank, CPU), 60.0):
            raise RuntimeError("disk full")
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def _fails_with_a_note(rank: int, world_size: int) -> list[str]:
    fault = RuntimeError("Connection closed by peer")
    fault.add_note("step-00000004: could not be saved")
    with pytest.raises(LateRankError) as caught, Watchdog(Ranks(rank, world_size, rank, CPU), 60.0):
        raise fault
    torch.distributed.barrier()  # rank 0 keeps what the other one reads
    return caught.value.__notes__


def test_what_was_noted_on_a_fault_is_not_lost():
    assert run_ranks(_fails_with_a_note, 2) == [["step-00000004: could not be saved"]] * 2


def test_a_fault_that_is_no_timeout_stays_as_it_is():
    assert run_ranks(_fails, 2) == ["RuntimeError: disk full"] * 2


def test_the_flight_recorder_is_switched_on_and_the_users_settings_stay(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *NCCL_SETTINGS, "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    start_ranks(records="runs/a/logs/nccl-rank-")
    stop_ranks()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "runs/a/logs/nccl-rank-"
