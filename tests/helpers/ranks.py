"""Functions run on several ranks, each a forked process on gloo."""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch


class RankFailure(AssertionError):
    """A rank failed or did not end in time; the message holds the traceback of the rank that failed first."""


def join_again(rank: int, world_size: int, folder: Path, seconds: int) -> None:
    """Replace the process group of this rank by one with a timeout of its own, which `run_ranks` sets too high to wait.

    The caller destroys it.
    """
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=seconds), world_size, rank
    )


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900) -> list[Any]:
    """Call fn(rank, world_size, *args) in forked processes joined by gloo; return their results in order of rank.

    Each has one thread, RANK, WORLD_SIZE and LOCAL_RANK set, and an initialised default process group. Arguments are
    inherited, results are pickled. Raises RankFailure with the traceback of the first rank that fails, or with the
    stacks of those that are not done after `timeout` seconds, a guard against hangs alone; no process remains.
    """
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as scratch:
        ranks: dict[Connection, tuple[int, Any]] = {}
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(fn, rank, world_size, args, scratch, timeout, sender))
            process.start()
            sender.close()
            ranks[receiver] = (rank, process)
        try:
            return _results(dict(ranks), Path(scratch), time.monotonic() + timeout, timeout)
        finally:
            for receiver, (_, process) in ranks.items():
                receiver.close()
                process.kill()
                process.join()


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple, scratch: str, timeout: float, sender: Connection
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not fail the tests
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage often; going through all that was inherited takes seconds each time
    with open(f"{scratch}/stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
        try:
            limit = timedelta(seconds=2 * timeout)  # later than the parent's limit, whose report says more
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size, timeout=limit
            )
            result = pickle.dumps((True, fn(rank, world_size, *args)))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # nobody hangs up while another still talks
        except BaseException:  # whatever it is, only the parent can report it
            result = pickle.dumps((False, (time.monotonic(), traceback.format_exc())))
        sender.send_bytes(result)
        faulthandler.cancel_dump_traceback_later()


def _results(waiting: dict[Connection, tuple[int, Any]], scratch: Path, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = [f"rank {rank} was at\n{(scratch / f'stack-{rank}').read_text()}" for rank, _ in waiting.values()]
            raise RankFailure(f"not done after {timeout} seconds:\n" + "\n".join(stacks))
        failures = []
        for receiver in [connection for connection in waiting if connection in ready]:
            rank, process = waiting.pop(receiver)
            try:
                succeeded, result = pickle.loads(receiver.recv_bytes())
            except EOFError:
                process.join()
                raise RankFailure(f"rank {rank} died without a word, exit code {process.exitcode}") from None
            if succeeded:
                results[rank] = result
            else:
                failures.append((*result, rank))
        if failures:
            _, report, rank = min(failures)  # the others mostly report that this one hung up on them
            raise RankFailure(f"rank {rank} failed:\n{report}")
    return [results[rank] for rank in sorted(results)]
