"""A signal lets the run finish its step, save, and end with an exit code that asks for a restart."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3vl_train.checkpoint.manifest import latest_checkpoint
from qwen3vl_train.config import Recipe, save_recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.stop import StopRequest, StopSignals
from qwen3vl_train.train.cli import sft
from qwen3vl_train.train.loop import train
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import RankFailure, run_ranks
from tests.helpers.small_runs import in_child, losses


def _within_step(number: int, act: Callable[[], None]) -> None:
    """From now on in this process: act while step `number`, counted from one, is under way."""
    faults.around_steps(before=lambda step: act() if step == number else None)


def _send(*numbers: signal.Signals) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signalled_run_saves_its_step_and_resumes(small: Path, task: Path, tmp_path: Path, number, capfd):
    case = {"checkpoint__every_steps": 4, "tune": small_runs.LORA}
    straight = train(small_runs.make_recipe(small, task, tmp_path / "straight", **case))
    recipe = small_runs.make_recipe(small, task, tmp_path / "stopped", **case)
    save_recipe(recipe, file := tmp_path / "recipe.yaml")

    def work() -> None:
        _within_step(3, _send(number))
        sys.exit(sft([str(file)]))

    assert in_child(work) == 75
    run = tmp_path / "stopped" / "run"
    assert f"{run}: asked to stop, saved after step 3; start it again to continue" in capfd.readouterr().out
    assert len(losses(run)) == 3
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000003"
    assert in_child(lambda: sys.exit(sft([str(file)]))) == 0
    assert losses(run) == losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(run), small_runs.final_tensors(straight))


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGTERM, signal.SIGTERM), 128 + 15), ((signal.SIGTERM, signal.SIGUSR1), 128 + 10)],
    ids=["term-term", "term-usr1"],
)
def test_a_second_signal_ends_the_run_at_once(small: Path, task: Path, tmp_path: Path, signals, code):
    recipe = small_runs.make_recipe(small, task, tmp_path)

    def work() -> None:
        _within_step(2, _send(*signals))
        train(recipe)

    assert in_child(work) == code
    assert len(losses(tmp_path / "run")) == 1
    assert latest_checkpoint(tmp_path / "run") is None


def test_a_stop_skips_an_export(small: Path, task: Path, tmp_path: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path, checkpoint={"export_every_steps": 2}, tune=small_runs.LORA)

    def work() -> None:
        _within_step(2, _send(signal.SIGTERM))
        with pytest.raises(StopRequest):
            train(recipe)

    assert in_child(work) == 0
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert not (tmp_path / "run" / "export").exists()


def _signal_a_waiting_rank(rank: int, world_size: int) -> None:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    (pid, *_) = ranks.gather(os.getpid())
    if rank == 0:
        with StopSignals():
            ranks.reduce([1.0])  # the signal handlers are installed
            ranks.reduce([1.0])  # the other rank never comes
    ranks.reduce([1.0])
    time.sleep(0.5)  # most likely rank 0 waits by then; a signal that comes sooner only tests less
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
        while _is_pending(pid, number):
            time.sleep(0.01)
    time.sleep(600)


def _is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal that was sent to a process is not delivered yet."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:"))
    return bool(int(line.split()[1], 16) >> number - 1 & 1)


def test_a_second_signal_ends_a_rank_in_a_collective(tmp_path: Path):
    """No Python handler runs within torch's C++."""
    with pytest.raises(RankFailure, match=f"rank 0 died without a word, exit code {128 + signal.SIGUSR1}$"):
        run_ranks(_signal_a_waiting_rank, 2)


def test_a_signal_in_the_last_step_changes_nothing(small: Path, task: Path, tmp_path: Path):
    recipe = small_runs.make_recipe(small, task, tmp_path, train__num_steps=2)

    def work() -> None:
        _within_step(2, _send(signal.SIGTERM))
        train(recipe)

    assert in_child(work) == 0
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000002"


def _signalled_on_rank_one(rank: int, world_size: int, recipe: Recipe) -> str:
    if rank == 1:
        _within_step(2, _send(signal.SIGUSR1))
    return message_of(StopRequest, train, recipe)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_stop_after_the_same_step(small: Path, task: Path, tmp_path: Path, engine: str):
    recipe = small_runs.make_recipe(small, task, tmp_path, parallel__engine=engine, train__packs_per_step=2)
    messages = run_ranks(_signalled_on_rank_one, 2, recipe)
    run = tmp_path / "run"
    assert messages == [f"{run}: asked to stop, saved after step 2; start it again to continue"] * 2
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000002"


def test_the_previous_handlers_are_restored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            assert not stop.received
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
            worker.start()  # holds open what it inherits
        worker.kill()
        worker.join()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.set_wakeup_fd(-1) == -1
        assert "signals" not in [thread.name for thread in threading.enumerate()]
    finally:
        signal.signal(signal.SIGUSR1, before)
