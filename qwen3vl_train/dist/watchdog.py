"""Who is late: the last step of every rank, kept where all can read it, told when a collective times out.

A rank that hangs cannot speak for itself, and those that wait for it know only that they wait. So a thread of every
rank writes its step, and the line the training thread is at, to the store of the rendezvous; whoever times out reads
what all have written.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as torch_dist

from qwen3vl_train.dist import ranks
from qwen3vl_train.dist.ranks import BEATS, Ranks, await_main

_PACKAGE = Path(__file__).parents[1]
_RANKS = Path(ranks.__file__)
# What gloo, NCCL, the store and torch's debug wrapper say of a rank that does not answer.
_NO_ANSWER = re.compile(
    r"(?i)timed? ?out|timeout|connection (closed|reset|refused)|broken pipe|monitoredbarrier|detected mismatch"
)
TELL_AT = 0.9  # of the timeout: NCCL ends the process at the timeout itself, without a Python exception


class LateRankError(RuntimeError):
    """A collective failed because a rank did not come; the message names it and lists the last step of every rank."""


@dataclass(frozen=True)
class RankState:
    """What a rank last told of itself, silent_seconds ago. waits: its training thread was inside a collective."""

    rank: int
    step: int
    place: str
    waits: bool
    silent_seconds: float


class Watchdog:
    """A with-block around the training loop. `beat(step)` after every step; costs the loop nothing.

    While rank 0 beats (`Ranks.beat`), nobody is late.

    Turns an error of a collective into LateRankError. Where there is no exception (NCCL ends the process from a thread
    of its own) ranks 0 and 1 tell the same at nine tenths of the timeout, by `tell`. It stops no rank that goes on.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float, tell: Callable[[str], None] | None = None) -> None:
        self._ranks, self._timeout, self._tell = ranks, timeout_seconds, tell or _to_stderr
        self._interval = min(10.0, timeout_seconds / 10)
        self._thread_id = threading.get_ident()  # of the training thread, which need not be the main one (Ray)
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._beats = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int) -> None:
        """Take note that this rank has finished a step (of an epoch, an evaluation, a save)."""
        self._step, self._since, self._told = step, time.monotonic(), False

    def __enter__(self) -> "Watchdog":
        if self._ranks.world_size > 1:
            # A connection of its own: the main thread may hold the other one while it waits.
            store: Any = torch_dist.distributed_c10d._get_default_store()  # torch's stubs do not know `clone`
            self._store = store.clone()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        failed = isinstance(error, torch_dist.DistError) or (
            isinstance(error, RuntimeError) and _NO_ANSWER.search(str(error)) is not None
        )
        if failed:
            first_line = str(error).strip().splitlines()[0]
            fault = "gone or late" if "connection" in first_line.lower() else "late"
            late = LateRankError(f"{self.report(fault)}\n  {first_line}")
            for note in getattr(error, "__notes__", []):
                late.add_note(note)
            raise late from error

    def report(self, fault: str = "late") -> str:
        """The last step of every rank, and who is `fault`. Sends nothing to the ranks themselves."""
        try:
            states = self._states()
        except RuntimeError:
            return (
                f"step {self._step + 1}: a collective failed, and rank 0, which keeps the steps of all ranks, is gone"
            )
        return describe(states, self._ranks.world_size, self._timeout, fault)

    def _states(self) -> list[RankState]:
        """Of all ranks but this one as they last told, of this one as it is."""
        now = time.time()
        states = []
        for rank in range(self._ranks.world_size):
            if rank == self._ranks.rank:
                states.append(RankState(rank, self._step, "", True, 0.0))
            elif self._store.check([f"watch/{rank}"]):
                told = json.loads(self._store.get(f"watch/{rank}"))
                silent = max(0.0, now - told["time"] - self._interval)
                states.append(RankState(rank, told["step"], told["place"], told["waits"], silent))
        return states

    def _run(self) -> None:
        while True:
            place, waits = where(sys._current_frames().get(self._thread_id))
            told = {"step": self._step, "place": place, "waits": waits, "time": time.time()}
            try:
                self._store.set(f"watch/{self._ranks.rank}", json.dumps(told))
                beats = self._store.add(BEATS, 0)
            except RuntimeError:
                return  # the store went with rank 0; the main thread meets the same fault and tells it
            if beats != self._beats:  # rank 0 is at work that the others wait for
                self._beats, self._since = beats, time.monotonic()
            told_at, told_step = time.monotonic(), self._step
            late = time.monotonic() - self._since > TELL_AT * self._timeout
            if late and not self._told and self._ranks.rank < 2:  # two tell it: one may be the one that hangs
                self._told = True
                self._tell(f"no step for {time.monotonic() - self._since:.0f} s. {self.report()}")
            # A new step is told within a second, anything else at every interval.
            while True:
                if self._done.wait(min(1.0, self._interval)):
                    return
                if self._step != told_step or time.monotonic() - told_at >= self._interval:
                    break


def where(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of this package (without dist/ranks.py) that a thread is at, and whether it waits."""
    place, waits = "", False
    while frame is not None:
        code = frame.f_code
        if "/torch/distributed/" in code.co_filename or code is await_main.__code__:
            waits = True
        file = Path(code.co_filename)
        if not place and file.is_relative_to(_PACKAGE) and file != _RANKS:
            place = f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return place, waits


def describe(states: list[RankState], world_size: int, timeout_seconds: float, fault: str = "late") -> str:
    """One line that names who is late, then one line for each group of ranks that are at the same place.

    Late are ranks that have told nothing of late, or else those at the lowest step that wait for nobody. Where that
    would be all ranks, none is named: they wait for each other, in different collectives.
    """
    lost = [rank for rank in range(world_size) if rank not in {state.rank for state in states}]
    silent = [state.rank for state in states if state.silent_seconds > timeout_seconds / 3]
    lowest = min(state.step for state in states)
    behind = [state.rank for state in states if state.step == lowest and not state.waits]
    if not behind:
        behind = [state.rank for state in states if state.step == lowest]
    late = [*lost, *silent] or behind
    step = lowest + 1
    if len(late) == world_size:
        lines = [f"step {step}: no rank is behind the others; do they run the same code on the same recipe?"]
    else:
        lines = [f"step {step}: {_named(late)} {'is' if len(late) == 1 else 'are'} {fault}"]
    lines += [f"  {_named(lost)}: never heard of"] if lost else []
    groups: dict[tuple, list[RankState]] = {}
    for state in states:
        groups.setdefault((state.step, state.place, state.waits, state.rank in silent), []).append(state)
    for (last, place, waits, is_silent), members in groups.items():
        at = f", {'waiting for the others in' if waits else 'at'} {place}" if place else ", waiting for the others"
        heard = f", silent for {max(state.silent_seconds for state in members):.0f} s" if is_silent else ""
        lines.append(f"  {_named([state.rank for state in members])}: last step {last}{at}{heard}")
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


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
