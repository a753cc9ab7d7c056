"""No rank ever holds more of a checkpoint than its own part."""

import ctypes
import threading
import time
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from torch import nn

from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.config import Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import to_local
from qwen3vl_train.parallel.deepspeed.config import deepspeed_config
from qwen3vl_train.parallel.deepspeed.engine import start_deepspeed
from qwen3vl_train.parallel.deepspeed.internals import partitioned_fill
from qwen3vl_train.parallel.mesh import build_mesh
from qwen3vl_train.train.build import build_model
from tests.helpers import engine_runs
from tests.helpers.ranks import run_ranks

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    tiny_checkpoint.write_tiny_checkpoint(folder, hidden_size=1024, num_layers=13, vision_depth=3)
    assert 480e6 < (folder / "model.safetensors").stat().st_size < 560e6
    return folder


def _own_memory() -> int:
    """Bytes that this process alone holds: RssAnon.

    The whole resident set would count the pages of the mapped checkpoint file too. Those are the file cache's: all
    ranks of a machine share them, and the kernel takes them back when it needs room.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/self/status")


class _Peak:
    """A context manager that samples the memory every millisecond."""

    def __enter__(self) -> "_Peak":
        # What was freed before and not given back would be used first, unseen.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = self.highest = _own_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, _own_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = _own_memory()


def _build(recipe: Recipe, ranks: Ranks) -> nn.Module:
    if recipe.parallel.engine == "deepspeed":
        return build_model(recipe, device="cpu", fill=partitioned_fill(deepspeed_config(recipe, ranks.world_size)))
    return build_model(recipe, device="cpu", mesh=build_mesh(recipe.parallel, ranks))


def _held(model: nn.Module) -> int:
    pieces = [getattr(parameter, "ds_tensor", to_local(parameter)) for parameter in model.parameters()]
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def _load_alone(rank: int, world_size: int, large: Path, small: Path, dtype: torch.dtype) -> tuple[int, int]:
    load_qwen3_vl_model(small, dtype=dtype)  # what is imported on the way does not count
    with _Peak() as memory:
        model = load_qwen3_vl_model(large, dtype=dtype)
    return _held(model), memory.highest - memory.before


@pytest.mark.measures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_alone_holds_no_second_copy(half_a_gigabyte: Path, small: Path, dtype: torch.dtype):
    ((weights, peak),) = run_ranks(_load_alone, 1, half_a_gigabyte, small, dtype)
    assert weights > 240e6
    assert 0.9 * weights < peak < 1.25 * weights


def _load(rank: int, world_size: int, recipe: Recipe, like_it: Recipe) -> tuple[int, int, int]:
    """Bytes of this rank's part, and how far memory rose at most and in the end while the model was loaded.

    like_it: a small model is loaded before, so that the libraries that are imported on the way (90 MiB with peft) are
    not counted.
    """
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    if recipe.parallel.engine == "deepspeed":
        start_deepspeed(ranks)
    _build(like_it, ranks)
    with _Peak() as memory:
        model = _build(recipe, ranks)
    return _held(model), memory.highest - memory.before, memory.after - memory.before


CASES = [
    ("fsdp2", "full", "float32"),
    ("fsdp2", "full", "bfloat16"),
    ("fsdp2", "lora", "float32"),
    ("fsdp2", "lora", "bfloat16"),
    ("zero3", "full", "float32"),
    ("zero3", "full", "bfloat16"),
    ("zero3", "lora", "bfloat16"),
]


@pytest.mark.measures
@pytest.mark.parametrize(("engine", "tune", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_loading_takes_the_shard_and_a_quarter_at_most(
    half_a_gigabyte: Path, small: Path, engine: str, tune: str, dtype: str
):
    parallel = {"engine": "fsdp2"} if engine == "fsdp2" else {"engine": "deepspeed", "zero_stage": 3}
    recipe, like_it = (
        engine_runs.engine_recipe(folder, engine_runs.TUNES[tune], dtype=dtype, **parallel)
        for folder in (half_a_gigabyte, small)
    )
    stored = (half_a_gigabyte / "model.safetensors").stat().st_size
    for shard, peak, after in run_ranks(_load, 2, recipe, like_it):
        print(
            f"{engine} {tune} {dtype}: shard {shard / MEBIBYTE:.0f} MiB, peak {peak / MEBIBYTE:.0f} MiB, "
            f"after {after / MEBIBYTE:.0f} MiB of {stored / MEBIBYTE:.0f} MiB stored"
        )
        # What is frozen is held in the recipe's dtype, what trains by fsdp2 in float32; ZeRO makes its masters later.
        # The file is float32.
        share = 0.5 if dtype == "float32" or (engine == "fsdp2" and tune == "full") else 0.25
        assert shard == pytest.approx(share * stored, rel=0.02)
        assert 0.9 * shard < after, "the measure sees what is held"
        assert peak < 1.25 * shard


@pytest.mark.measures
def test_the_measure_sees_a_copy_of_one_tenth():
    tenth = 50 * MEBIBYTE
    with _Peak() as memory:
        copy = torch.ones(tenth // 4)
        time.sleep(0.05)
        del copy
    assert 0.9 * tenth < memory.highest - memory.before < 1.2 * tenth
