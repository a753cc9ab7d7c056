"""Name the late rank: the last step of every rank, kept where all can read it and reported when a collective times out.

A rank that hangs cannot report it, and the others know only that they wait. So a thread of every rank writes its step,
and the line that the training thread is at, to the rendezvous store; a rank that times out reads what all have written.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as torch_dist

from qwen3vl_train.dist import ranks
from qwen3vl_train.dist.ranks import HEARTBEATS, Ranks, wait_for_main

_PACKAGE = Path(__file__).parents[1]
_RANKS = Path(ranks.__file__)
# What gloo, NCCL, the store and torch's debug wrapper report about a rank that does not answer.
_NO_ANSWER = re.compile(
    r"(?i)timed? ?out|timeout|connection (closed|reset|refused)|broken pipe|monitoredbarrier|detected mismatch"
)
REPORT_AT = 0.9  # of the timeout: NCCL ends the process at the timeout itself, without a Python exception


class LateRankError(RuntimeError):
    """A collective failed because a rank did not join it; the message names it and has the last step of every rank."""


@dataclass(frozen=True)
class RankState:
    """What a rank last reported."""

    rank: int
    step: int  # the last one that it finished
    location: str  # the line that its training thread was at
    waits: bool  # the training thread was inside a collective
    silent_seconds: float  # since it should have reported again


class Watchdog:
    """A context manager around the training loop; call `heartbeat(step)` after every step. Costs the loop nothing.

    Turns an error of a collective into LateRankError. Where no exception is raised (NCCL ends the process from a thread
    of its own), ranks 0 and 1 pass the same text to `report` at nine tenths of the timeout. It stops no rank. While
    rank 0 sends heartbeats (`Ranks.heartbeat`), no rank is late.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float, report: Callable[[str], None] | None = None) -> None:
        self._ranks, self._timeout = ranks, timeout_seconds
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._interval = min(10.0, timeout_seconds / 10)
        self._thread_id = threading.get_ident()  # of the training thread, which need not be the main one (Ray)
        self._step, self._since, self._reported = 0, time.monotonic(), False
        self._heartbeats_of_main = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def heartbeat(self, step: int) -> None:
        """Note that this rank makes progress after `step` finished steps (also within an evaluation or a save)."""
        self._step, self._since, self._reported = step, time.monotonic(), False

    def __enter__(self) -> "Watchdog":
        if self._ranks.world_size > 1:
            # A connection of its own: the main thread may hold the other one while it waits.
            store: Any = torch_dist.distributed_c10d._get_default_store()  # torch's stubs lack `clone`
            self._store = store.clone()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        is_unanswered = isinstance(error, RuntimeError) and _NO_ANSWER.search(str(error))
        if isinstance(error, torch_dist.DistError) or is_unanswered:
            first_line = str(error).strip().splitlines()[0]
            problem = "gone or late" if "connection" in first_line.lower() else "late"
            late = LateRankError(f"{self._describe(problem)}\n  {first_line}")
            for note in getattr(error, "__notes__", []):
                late.add_note(note)
            raise late from error

    def _describe(self, problem: str = "late") -> str:
        """Return the last step of every rank, and which rank has the problem. Sends nothing to the other ranks."""
        try:
            states = self._states()
        except RuntimeError:
            step = self._step + 1
            return f"step {step}: a collective failed, and rank 0, which keeps the steps of all ranks, is gone"
        return describe(states, self._ranks.world_size, self._timeout, problem)

    def _states(self) -> list[RankState]:
        """Return the last reported state of the other ranks and the present one of this rank."""
        now = time.time()
        states = []
        for rank in range(self._ranks.world_size):
            if rank == self._ranks.rank:
                states.append(RankState(rank, self._step, "", True, 0.0))
            elif self._store.check([f"watchdog/{rank}"]):
                state = json.loads(self._store.get(f"watchdog/{rank}"))
                silent = max(0.0, now - state["time"] - self._interval)
                states.append(RankState(rank, state["step"], state["location"], state["waits"], silent))
        return states

    def _run(self) -> None:
        while True:
            location, waits = locate(sys._current_frames().get(self._thread_id))
            state = {"step": self._step, "location": location, "waits": waits, "time": time.time()}
            try:
                self._store.set(f"watchdog/{self._ranks.rank}", json.dumps(state))
                heartbeats = self._store.add(HEARTBEATS, 0)
            except RuntimeError:
                return  # the store is gone with rank 0; the main thread meets the same error and reports it
            if heartbeats != self._heartbeats_of_main:  # rank 0 does work that the others wait for
                self._heartbeats_of_main, self._since = heartbeats, time.monotonic()
            written_at, written_step = time.monotonic(), self._step
            late = time.monotonic() - self._since > REPORT_AT * self._timeout
            if late and not self._reported and self._ranks.rank < 2:  # two ranks, because one may be the one that hangs
                self._reported = True
                self._report(f"no step for {time.monotonic() - self._since:.0f} s. {self._describe()}")
            # A new step is written within a second, anything else at every interval.
            while True:
                if self._done.wait(min(1.0, self._interval)):
                    return
                if self._step != written_step or time.monotonic() - written_at >= self._interval:
                    break


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of this package (without dist/ranks.py) of a thread, and whether the thread waits."""
    location, waits = "", False
    while frame is not None:
        code = frame.f_code
        waits = waits or "/torch/distributed/" in code.co_filename or code is wait_for_main.__code__
        file = Path(code.co_filename)
        if not location and file.is_relative_to(_PACKAGE) and file != _RANKS:
            location = f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return location, waits


def describe(states: list[RankState], world_size: int, timeout_seconds: float, problem: str = "late") -> str:
    """Return one line that names the late ranks, then one line for each group of ranks that are at the same line.

    Late are ranks that have stopped reporting, or else those at the lowest step that wait for nobody. Where that would
    be all ranks, none is named: they wait for each other, in different collectives.
    """
    unknown = sorted(set(range(world_size)) - {state.rank for state in states})
    silent = [state.rank for state in states if state.silent_seconds > timeout_seconds / 3]
    lowest = min(state.step for state in states)
    last = [state for state in states if state.step == lowest]
    late = [*unknown, *silent] or [state.rank for state in last if not state.waits] or [state.rank for state in last]
    what = f"{_named(late)} {'is' if len(late) == 1 else 'are'} {problem}"
    if len(late) == world_size:
        what = "no rank is later than the others; do they run the same code on the same recipe?"
    lines = [f"step {lowest + 1}: {what}"]
    if unknown:
        lines.append(f"  {_named(unknown)}: never reported")
    groups: dict[tuple, list[RankState]] = {}
    for state in states:
        groups.setdefault((state.step, state.location, state.waits, state.rank in silent), []).append(state)
    for (last_step, location, waits, is_silent), members in groups.items():
        at = f"{'waiting for the others in' if waits else 'at'} {location}" if location else "waiting for the others"
        since = f", silent for {max(state.silent_seconds for state in members):.0f} s" if is_silent else ""
        lines.append(f"  {_named([state.rank for state in members])}: last step {last_step}, {at}{since}")
    return "\n".join(lines)


def _named(ranks: list[int]) -> str:
    """[0, 2, 3, 4] -> 'ranks 0, 2-4'."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
