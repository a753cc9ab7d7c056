"""Worker processes: items go to whichever worker is free, results come back in the order of the items."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qwen3vl_train.data.rejects import NoUsableRowError

# What schedulers and launchers send to a whole process group or job when the run is to stop.
_STOPS = (signal.SIGTERM, signal.SIGUSR1)


def in_workers(
    work: Callable[[Any], Any], items: Iterable[Any], num_workers: int, *, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield work(item) for every item, in their order; with num_workers of 0 in this process, when asked for.

    items is iterated in this process, two items a worker ahead. Tensors come back through shared memory. Raises
    RuntimeError when a worker dies, the ValueError that `work` raises, and what iterating items raises.
    """
    if not num_workers:
        return map(work, items)
    return _items_in_workers(_Apply(work), items, num_workers, pin_memory)


def _items_in_workers(dataset: "_Apply", items: Iterable[Any], num_workers: int, pin_memory: bool) -> Iterator[Any]:
    failures: list[Exception] = []

    def sampler() -> Iterator[Any]:
        # Raised inside DataLoader, an error would leave its workers and queues to the garbage collector, which closes
        # the pipes in any order and under the threads that still write to them.
        try:
            yield from items
        except Exception as error:  # of any type: it is raised again, after the results of the items before it
            failures.append(error)
            yield _ItemsFailed()

    for result in _results(dataset, sampler=sampler(), num_workers=num_workers, pin_memory=pin_memory):
        if isinstance(result, _ItemsFailed):
            raise failures[0]
        yield result


def from_worker(
    make: Callable[[Any], Iterator[Any]], argument: Any, *, in_process: bool, ahead: int = 1
) -> Iterator[Any]:
    """Yield what make(argument) yields, made in one worker process so many items ahead, or in this one.

    Raises RuntimeError when the worker dies, and the ValueError that `make` raises.
    """
    if in_process:
        return make(argument)
    return _results(_Make(make, argument), num_workers=1, prefetch_factor=ahead)


class _Failed:
    """The message of a ValueError raised in a worker; DataLoader would wrap it in a traceback."""

    def __init__(self, error: ValueError) -> None:
        self.message = str(error)
        self.rejects = error.rejects if isinstance(error, NoUsableRowError) else None

    def error(self) -> ValueError:
        return ValueError(self.message) if self.rejects is None else NoUsableRowError(self.message, self.rejects)


def _results(dataset: Dataset, **options: Any) -> Iterator[Any]:
    # A generator of its own: else the loader draws from, and moves, torch's global stream.
    generator = torch.Generator()
    loader = DataLoader(
        dataset, batch_size=None, collate_fn=unchanged, worker_init_fn=_start_worker, generator=generator, **options
    )
    # Workers begin with the signals blocked, or one that comes while they start would still reach them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        results = iter(loader)  # starts them
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for result in results:
            if isinstance(result, _Failed):
                raise result.error()
            yield result
    finally:
        # Ends the workers here. Held by the frame of an exception, the loader would be freed by the garbage collector,
        # which closes the pipes of its queues in any order and under the threads that still write to them.
        del results


class _ItemsFailed:
    """In place of the item that could not be made; a worker returns it unchanged."""


class _Apply(Dataset):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, _ItemsFailed):
            return item
        try:
            return self.work(item)
        except ValueError as error:
            return _Failed(error)


class _Make(IterableDataset):
    def __init__(self, make: Callable[[Any], Iterator[Any]], argument: Any) -> None:
        self.make, self.argument = make, argument

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.make(self.argument)
        except ValueError as error:
            yield _Failed(error)


def unchanged(result: Any) -> Any:
    """Return the argument: worker processes cannot take a lambda."""
    return result


def _start_worker(worker: int) -> None:
    """Use one thread and ignore stop signals: the rank needs its workers until its step is done and saved.

    Only the parent's own SIGTERM ends a worker (torch sends it to one that does not exit by itself). A handler does not
    learn who sent a signal, so the signals are blocked and a thread receives them. Workers whose parent has died are
    ended by torch's watchdog.
    """
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    threading.Thread(target=_obey_the_parent, name="signals", daemon=True).start()


def _obey_the_parent() -> None:
    parent = os.getppid()
    while True:
        received = signal.sigwaitinfo(_STOPS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
