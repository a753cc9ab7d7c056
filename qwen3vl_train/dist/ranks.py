"""Ranks and devices: who this process is, and the few sums that ranks exchange outside the model."""

import hashlib
import json
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as torch_dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank 0..world_size-1, local_rank on its machine, its device.

    A single process is a world of one in which every sum is its own value; no process group is made for it.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each number over all ranks, in float64. Every rank must call it, with the same count of numbers."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """The largest of all ranks' numbers. Every rank must call it."""
        return self.maxima([value])[0]

    def maxima(self, values: list[float]) -> list[float]:
        """The largest of all ranks' numbers at each place. Every rank must call it, with the same count of numbers."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
        return tensor.tolist()

    def agree(self, words: str) -> bool:
        """Say whether all ranks hold the same text: 48 bits of its hash are compared. Every rank must call it."""
        mark = float(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=6).digest()))
        highest, negated_lowest = self.maxima([mark, -mark])
        return highest == -negated_lowest

    def from_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do some work and give its small result, or what it raised, to all. Every rank must call it.

        The others wait as long as it takes: until rank 0 has given no sign for the timeout of the process group. Work
        that may take longer calls `beat` now and then. What is no ValueError, RuntimeError or OSError is a RuntimeError
        to the others.
        """
        if self.world_size == 1:
            return work()
        store = _store()
        done = f"main/done/{store.add(f'main/calls/{self.rank}', 1)}"
        outcome: list[Any] = [None, None]
        fault: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:  # whatever it is, the others wait for it
                fault, outcome[1] = error, _told(error)
            store.set(done, "1")
        else:
            await_main(store, done)
        torch_dist.broadcast_object_list(outcome, src=0)
        if fault is not None:
            raise fault
        if outcome[1] is not None:
            raise _retold(*outcome[1])
        return outcome[0]

    def beat(self) -> None:
        """On rank 0, in work that others wait for: say that it goes on."""
        if self.world_size > 1 and self.is_main:
            _store().add(BEATS, 1)

    def everywhere(self, work: Callable[[], T]) -> T:
        """Let every rank do some work; where it fails on any, all raise (`raise_together`). Every rank must call it."""
        result: Any = None
        fault: Exception | None = None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not go on without this rank
            fault = error
        self.raise_together(fault)
        return result

    def raise_together(self, fault: Exception | None) -> None:
        """Raise on every rank where any has a fault: there its own, elsewhere one of its kind that names the rank.

        Every rank must call it, those that are well with None.
        """
        if not self.max(float(fault is not None)):
            return
        told = self.gather(None if fault is None else _told(fault))
        if fault is not None:
            raise fault
        ranks = [rank for rank, text in enumerate(told) if text is not None]
        kind, text = told[ranks[0]]
        others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        raise _retold(kind, f"rank {ranks[0]}{others}: {text}")

    def gather(self, value: Any) -> list[Any]:
        """Collect one small object from every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        out: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier()


class Board:
    """Notes that rank 0 leaves for the others, through the store of the rendezvous.

    No rank meets another for it: only who reads a note that is not written yet waits, and rank 0 never does.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Every rank must make its boards in the same order."""
        self._ranks, self._name = ranks, f"board/{_store().add(f'boards/{ranks.rank}', 1)}"

    def write(self, key: str, note: Any) -> None:
        """On rank 0: leave a note, as JSON. A key is written once."""
        _store().set(f"{self._name}/{key}", zlib.compress(json.dumps(note).encode(), 1))
        self._ranks.beat()

    def read(self, key: str) -> Any:
        """On any other rank: return a note, once it is written. Each rank reads each note once; then it is gone.

        Raises RuntimeError where rank 0 gives no sign for the timeout of the process group.
        """
        store, key = _store(), f"{self._name}/{key}"
        await_main(store, key)
        note = json.loads(zlib.decompress(store.get(key)))
        if store.add(f"{key}/read", 1) == self._ranks.world_size - 1:
            store.delete_key(key)
            store.delete_key(f"{key}/read")
        return note


BEATS = "main/beats"
"""In the store: how often rank 0 has said that it goes on."""
_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError, "OSError": OSError}


def await_main(store: Any, key: str) -> None:
    """Wait until rank 0 has set a key. Raises RuntimeError once it has not beaten for the timeout of the store."""
    # Asked again and again, not `store.wait`: that holds the connection, and warns on the terminal when it times out.
    limit = store.timeout.total_seconds()
    pause, beats, heard = 0.001, -1, time.monotonic()
    while not store.check([key]):
        now = store.add(BEATS, 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > limit:
            raise RuntimeError(f"timed out: rank 0 has given no sign for {limit:.0f} s; look for its error")
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)


def _store() -> Any:
    return torch_dist.distributed_c10d._get_default_store()


def _told(fault: Exception) -> tuple[str, str]:
    """Kind and text of a fault, for other ranks."""
    for kind, known in _KINDS.items():
        if isinstance(fault, known):
            return kind, str(fault)
    return "RuntimeError", f"{type(fault).__name__}: {fault}"


def _retold(kind: str, text: str) -> Exception:
    return _KINDS[kind](text)


def seed_everything(*parts: int) -> None:
    """Seed python, numpy and torch from a tuple of integers: the same parts give the same numbers on any machine.

    parts: 0 <= part < 2**64. Other parts give other numbers, also where only the number of parts differs.
    """
    # A seed sequence pads with zeros and splits large integers, so that (3,) and (3, 0) would be the same to it.
    words = [len(parts), *(word for part in parts for word in divmod(part, 2**32))]
    state = numpy.random.SeedSequence(words).generate_state(2, dtype=numpy.uint64)
    random.seed(int(state[0]))
    numpy.random.seed(int(state[0]) % 2**32)
    torch.manual_seed(int(state[1]) % 2**63)
