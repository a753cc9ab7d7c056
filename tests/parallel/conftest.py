from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def zero_at_ease() -> Iterator[None]:
    """What makes hundreds of ZeRO steps bearable: one import for all ranks, and collectives that are not compared.

    At its import DeepSpeed asks a compiler about each of its operators, seconds for every forked rank. And ZeRO sends
    every small tensor by itself: comparing it between the ranks first, as TORCH_DISTRIBUTED_DEBUG=DETAIL does, triples
    the time in the kernel. A test that needs the comparison switches it on.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401

        dist.set_debug_level(dist.DebugLevel.OFF)
        yield
        dist.set_debug_level_from_env()
