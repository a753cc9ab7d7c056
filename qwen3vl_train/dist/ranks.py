"""Ranks: who this process is, and what the ranks exchange outside the model."""

import json
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy
import torch
import torch.distributed as torch_dist

T = TypeVar("T")
HEARTBEATS = "main/heartbeats"  # key in the store that counts the heartbeats of rank 0
_ERROR_TYPES: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError, "OSError": OSError}


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Every rank must call each method, except `heartbeat`, in the same order. A single process has no process group:
    what it would exchange is its own value.
    """

    rank: int
    world_size: int
    local_rank: int  # number of this process on its machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def reduce(self, values: Sequence[float], op: Literal["sum", "max"] = "sum") -> list[float]:
        """Return the sum or the maximum of each number over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX if op == "max" else torch_dist.ReduceOp.SUM)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.reduce([flag], "max") == [1.0]

    def gather(self, value: T) -> list[T]:
        """Return one small object of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run some work on rank 0 and return its small result, or raise its error, on every rank.

        The other ranks wait as long as rank 0 responds: they give up once it has sent no heartbeat for the timeout of
        the process group. Work that may take longer calls `heartbeat` now and then. An error that is not a ValueError,
        RuntimeError or OSError is a RuntimeError on the other ranks.
        """
        if self.world_size == 1:
            return work()
        store = _store()
        done = f"main/done/{store.add(f'main/calls/{self.rank}', 1)}"
        result: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                result[0] = work()
            except Exception as caught:  # of any type: the other ranks wait for the result
                error, result[1] = caught, serialize_error(caught)
            store.set(done, "1")
        else:
            wait_for_main(store, done)
        torch_dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise error or rebuild_error(*result[1])
        return result[0]

    def on_all(self, work: Callable[[], T]) -> T:
        """Run some work on every rank; where it fails on any rank, raise on all of them (`raise_together`)."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # of any type: the other ranks must not continue without this one
            error = caught
        if self.any(error is not None):
            self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank: its own error, or the first of the other ranks with the number of that rank.

        error: None on ranks that have none. At least one rank has one.
        """
        errors = self.gather(None if error is None else serialize_error(error))
        if error is not None:
            raise error
        (rank, (name, message)), *others = [(other, found) for other, found in enumerate(errors) if found is not None]
        more = f" and {len(others)} more" if others else ""
        raise rebuild_error(name, f"rank {rank}{more}: {message}")

    def heartbeat(self) -> None:
        """Report from rank 0 that work which the other ranks wait for is still in progress."""
        if self.world_size > 1 and self.is_main:
            _store().add(HEARTBEATS, 1)


class StoreBroadcast:
    """Messages from rank 0 to all other ranks through the rendezvous store.

    It is not a collective: only a rank that receives a message before it is sent waits, and rank 0 never does.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Open a broadcast. Every rank must open its broadcasts in the same order."""
        self._ranks, self._name = ranks, f"broadcast/{_store().add(f'broadcasts/{ranks.rank}', 1)}"

    def send(self, key: str, message: Any) -> None:
        """Store a message as JSON, on rank 0. Each key is sent once."""
        _store().set(f"{self._name}/{key}", zlib.compress(json.dumps(message).encode(), 1))
        self._ranks.heartbeat()

    def receive(self, key: str) -> Any:
        """Return a message, on any other rank; waits until it is sent. The last rank to receive it deletes it.

        Raises RuntimeError where rank 0 sends no heartbeat for the timeout of the process group.
        """
        store, key = _store(), f"{self._name}/{key}"
        wait_for_main(store, key)
        message = json.loads(zlib.decompress(store.get(key)))
        if store.add(f"{key}/received", 1) == self._ranks.world_size - 1:
            store.delete_key(key)
            store.delete_key(f"{key}/received")
        return message


def wait_for_main(store: Any, key: str) -> None:
    """Wait until rank 0 has set a key. Raises RuntimeError once it has sent no heartbeat for the store's timeout."""
    # Polled, because `store.wait` holds the connection and prints a warning when it times out.
    limit = store.timeout.total_seconds()
    pause, heartbeats, last_change = 0.001, -1, time.monotonic()
    while not store.check([key]):
        now = store.add(HEARTBEATS, 0)
        if now != heartbeats:
            heartbeats, last_change = now, time.monotonic()
        elif time.monotonic() - last_change > limit:
            raise RuntimeError(f"timed out: rank 0 has not responded for {limit:.0f} s; look for its error")
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)


def _store() -> Any:
    return torch_dist.distributed_c10d._get_default_store()


def serialize_error(error: Exception) -> tuple[str, str]:
    """Return type and message of an error, for other ranks."""
    for name, known in _ERROR_TYPES.items():
        if isinstance(error, known):
            return name, str(error)
    return "RuntimeError", f"{type(error).__name__}: {error}"


def rebuild_error(name: str, message: str) -> Exception:
    """Return the error that `serialize_error` serialized."""
    return _ERROR_TYPES[name](message)


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
