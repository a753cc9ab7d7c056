"""Worker processes outlive a stop of the whole process group, obey their parent, and do not outlive it."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3vl_train.data.packing.workers import from_worker, in_workers
from tests.helpers import faults, small_runs


def _own_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _wait_until(true: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds} seconds"
        time.sleep(0.02)


def test_an_error_of_the_items_comes_after_earlier_results():
    def items():
        yield from (0.0, 0.0)
        raise ValueError("no third item")

    results = in_workers(_own_pid, items(), 1)
    assert next(results) == next(results) != os.getpid()
    with pytest.raises(ValueError, match=r"^no third item$"):
        next(results)


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_from_elsewhere_does_not_reach_the_workers(number: str):
    results = in_workers(_own_pid, [0.0] * 40, 2)
    pids = {next(results), next(results)}
    assert os.getpid() not in pids
    for pid in pids:  # by another process: torchrun and Slurm are not the parent either
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)
    assert set(results) == pids
    _wait_until(lambda: not pids & {child.pid for child in multiprocessing.active_children()})


def test_a_signal_that_comes_while_workers_start_is_left_alone():
    """Before a worker is set up it has what it inherits: here, an end at once."""

    def work() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        fork = os.fork

        def fork_and_signal() -> int:
            pid = fork()
            if not pid:
                os.kill(os.getpid(), signal.SIGUSR1)
            return pid

        os.fork = fork_and_signal
        assert len(list(from_worker(lambda number: iter(range(number)), 3, in_process=False))) == 3
        os.kill(os.getpid(), signal.SIGUSR1)  # the parent hears it as before
        time.sleep(5)

    assert small_runs.in_child(work) == -signal.SIGUSR1


def test_a_busy_worker_ends_when_its_parent_says_so():
    def work() -> None:
        results = in_workers(_own_pid, [0.0, 9000.0], 1)
        pid = next(results)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        os.kill(pid, signal.SIGTERM)
        (child,) = multiprocessing.active_children()
        child.join(900)
        assert child.exitcode == 0
        os._exit(7)  # without waiting for what torch would do with the loader

    assert small_runs.in_child(work) == 7


def test_workers_of_a_killed_parent_leave(tmp_path: Path):
    def work() -> None:
        results = in_workers(_own_pid, [0.0] * 40, 2)
        (tmp_path / "pids").write_text(f"{next(results)} {next(results)}")
        faults.kill_self()

    assert small_runs.in_child(work) == -signal.SIGKILL
    pids = (tmp_path / "pids").read_text().split()
    _wait_until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
