"""A late rank is named, with the last step of every rank; no rank is named where none is later than the others."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from qwen3vl_train.dist.ranks import Ranks, wait_for_main
from qwen3vl_train.dist.rendezvous import NCCL_SETTINGS, start_ranks, stop_ranks
from qwen3vl_train.dist.watchdog import LateRankError, RankState, Watchdog, describe, locate
from tests.helpers.ranks import join_again, run_ranks

CPU = torch.device("cpu")


def _one_is_late(rank: int, world_size: int, late: int, folder: Path) -> str:
    join_again(rank, world_size, folder, seconds=5)
    ranks = Ranks(rank, world_size, rank, CPU)
    reports: list[str] = []

    def run() -> None:
        with Watchdog(ranks, timeout_seconds=5, report=reports.append) as watchdog:
            for step in range(1, 10):
                while step == 4 and rank == late and not (folder / "timed-out").exists():
                    time.sleep(0.05)
                ranks.reduce([1.0])
                watchdog.heartbeat(step)

    with pytest.raises(LateRankError) as caught:
        run()
    (folder / "timed-out").touch()
    torch.distributed.destroy_process_group()
    if rank == late:  # it finds that the other one is gone
        return ""
    # Reported before the timeout as well, for NCCL, which raises nothing.
    assert reports[0].splitlines()[0].endswith(str(caught.value).splitlines()[0])
    return str(caught.value)


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_named_with_all_last_steps(late: int, tmp_path: Path):
    lines = run_ranks(_one_is_late, 2, late, tmp_path)[1 - late].splitlines()
    assert lines[0] == f"step 4: rank {late} is late"
    assert {line.split(",")[0] for line in lines[1:3]} == {"  rank 0: last step 3", "  rank 1: last step 3"}
    assert f"  rank {1 - late}: last step 3, waiting for the others" in lines


def _works_on_main(rank: int, world_size: int) -> list[str]:
    reports: list[str] = []
    with Watchdog(ranks := Ranks(rank, world_size, rank, CPU), timeout_seconds=2, report=reports.append):
        for _ in range(20):
            time.sleep(0.2)
            ranks.heartbeat()
    return reports


def test_no_rank_is_late_while_rank_0_sends_heartbeats():
    assert run_ranks(_works_on_main, 2) == [[], []]


def state(rank: int, step: int, *, waits: bool = True, location: str = "parallel/ddp.py:31 sum", silent: float = 0.0):
    return RankState(rank, step, location, waits, silent)


def test_many_ranks_make_a_short_report():
    states = [state(rank, 7, waits=rank != 700, location="data/loader.py:88 take" if rank == 700 else "step.py:9 run")
              for rank in range(1024)]  # fmt: skip
    assert describe(states, 1024, 1800).splitlines() == [
        "step 8: rank 700 is late",
        "  ranks 0-699, 701-1023: last step 7, waiting for the others in step.py:9 run",
        "  rank 700: last step 7, at data/loader.py:88 take",
    ]


def test_missing_and_silent_ranks_are_late():
    states = [state(0, 2), state(1, 2, silent=900.0), state(3, 2)]
    assert describe(states, 4, 1800).splitlines() == [
        "step 3: ranks 1-2 are late",
        "  rank 2: never reported",
        "  ranks 0, 3: last step 2, waiting for the others in parallel/ddp.py:31 sum",
        "  rank 1: last step 2, waiting for the others in parallel/ddp.py:31 sum, silent for 900 s",
    ]


def test_the_lowest_step_is_late_where_no_rank_waits():
    # On a GPU the main thread waits for the device, which looks like any other line.
    states = [state(0, 5, waits=False), state(1, 4, waits=False)]
    assert describe(states, 2, 1800).startswith("step 5: rank 1 is late\n")


def test_no_rank_is_named_where_all_wait():
    assert describe([state(0, 5), state(1, 5)], 2, 1800).startswith("step 6: no rank is later than the others;")


class Located(Exception):
    pass


def test_a_location_skips_dist_ranks():
    def work() -> None:
        raise Located(*locate(sys._getframe()))

    with pytest.raises(Located) as caught:
        Ranks(0, 1, 0, CPU).on_main(work)
    assert caught.value.args == ("", False)


def test_a_rank_that_waits_for_rank_0_is_seen_to_wait():
    class Store:
        timeout = timedelta(seconds=9)

        def check(self, keys: list[str]) -> bool:
            raise Located(*locate(sys._getframe()))

    with pytest.raises(Located) as caught:
        wait_for_main(Store(), "done")
    assert caught.value.args == ("", True)


def test_a_run_of_one_rank_keeps_its_errors():
    with pytest.raises(ValueError, match=r"^fix this$"), Watchdog(Ranks(0, 1, 0, CPU), 5.0):
        raise ValueError("fix this")


def _fails(rank: int, world_size: int) -> str:
    try:
        with Watchdog(Ranks(rank, world_size, rank, CPU), 60.0):
            raise RuntimeError("disk full")
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_that_is_not_a_timeout_is_unchanged():
    assert run_ranks(_fails, 2) == ["RuntimeError: disk full"] * 2


def _fails_with_a_note(rank: int, world_size: int) -> list[str]:
    error = RuntimeError("Connection closed by peer")
    error.add_note("step-00000004: could not be saved")
    with pytest.raises(LateRankError) as caught, Watchdog(Ranks(rank, world_size, rank, CPU), 60.0):
        raise error
    torch.distributed.barrier()  # rank 0 keeps what the other one reads
    return caught.value.__notes__


def test_the_notes_of_an_error_are_kept():
    assert run_ranks(_fails_with_a_note, 2) == [["step-00000004: could not be saved"]] * 2


def test_nccl_settings_keep_what_the_user_set(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *NCCL_SETTINGS, "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    start_ranks(nccl_trace_prefix="runs/a/logs/nccl-rank-")
    stop_ranks()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "runs/a/logs/nccl-rank-"
