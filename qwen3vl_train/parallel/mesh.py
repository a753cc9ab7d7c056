"""The device mesh: `replicate` copies of the model, each cut into `shard` shards. An axis may have size 1."""

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen3vl_train.config import ParallelSection
from qwen3vl_train.dist.ranks import Ranks


def ensure_group(ranks: Ranks) -> None:
    """Create a process group of one where no launcher has created any: sharding needs one."""
    if not dist.is_initialized():
        assert ranks.world_size == 1, f"{ranks.world_size} ranks without a process group"
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def build_mesh(parallel: ParallelSection, ranks: Ranks) -> DeviceMesh:
    """Arrange all ranks as (replicate, shard). `parallel.shard` of null takes all ranks of a replica.

    Ranks that shard together are neighbours, so with one replica a machine the gathers stay inside it.
    Raises ValueError where the numbers do not multiply to the number of ranks.
    """
    replicate = parallel.replicate
    shard = parallel.shard or max(1, ranks.world_size // replicate)
    if replicate * shard != ranks.world_size:
        raise ValueError(
            f"parallel: replicate {replicate} x shard {shard} is not the {ranks.world_size} ranks that were started; "
            "change one of them or start as many ranks"
        )
    ensure_group(ranks)
    return init_device_mesh(ranks.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
