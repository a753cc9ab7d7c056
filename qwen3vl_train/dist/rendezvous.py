"""Start and stop the process group of all ranks: its store, and torchrun's restarts."""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from qwen3vl_train.dist.ranks import Ranks

# Read by NCCL's process group when it is created; what the user has set is kept. docs/scaling.md explains the traces.
# TORCH_FR_* are the newer names of TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE (deprecated).
NCCL_SETTINGS = {
    "TORCH_FR_BUFFER_SIZE": "2000",  # flight recorder: the last collectives of each rank, with stacks
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # written to TORCH_FR_DUMP_TEMP_FILE + rank
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a timeout ends the process; without it the run would hang forever
}


def start_ranks(*, timeout_seconds: float = 1800.0, nccl_trace_prefix: str | None = None) -> Ranks:
    """Read what the launcher put into the environment and join the other ranks; without it this is one process.

    timeout_seconds: how long a collective waits for the last rank.
    nccl_trace_prefix: of the files that NCCL's flight recorder writes on a timeout.
    """
    for name, value in NCCL_SETTINGS.items():
        os.environ.setdefault(name, value)
    if nccl_trace_prefix:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", nccl_trace_prefix)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if world_size > 1 and not torch_dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        place: dict[str, Any] = {}  # torch reads it from the environment
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # set by torchrun
            store = _store_of_this_start(rank, world_size, timeout)
            place = {"store": store, "rank": rank, "world_size": world_size}
        torch_dist.init_process_group(backend, timeout=timeout, **place)
    return Ranks(rank, world_size, local_rank, device)


def _store_of_this_start(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return torchrun's store under a prefix that only the ranks of this start use.

    torchrun keeps one store over its restarts, and torch (2.13) looks there for the addresses of the other ranks under
    names that do not change: a fast rank finds those of killed ranks, and all ranks hang or fail. So rank 0 invents a
    prefix and every rank a token; a rank accepts a prefix only once its own token is listed under it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("start", token)
        tokens = [store.get(f"{token}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{token}/all", " ".join(tokens))
        return PrefixStore(token, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", token)
        try:
            store.wait([f"{name}/all"], timedelta(seconds=1))
        except torch_dist.DistStoreError:
            continue
        if store.get(f"{name}/all").decode().split()[rank - 1 : rank] == [token]:
            return PrefixStore(name, store)
        time.sleep(0.1)
    raise RuntimeError(f"rank {rank}: rank 0 did not start within {timeout.total_seconds():.0f} s; look for its error")


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
