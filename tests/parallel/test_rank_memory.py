"""The memory and traffic of a rank against torch's own sharding of released shapes, in a fake process group."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3vl_train.config import ParallelSection, recipe_from_dict
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import to_local
from qwen3vl_train.model.costs import (
    Layout,
    fsdp_unit,
    rank_memory,
    rows_of_shard,
    text_activation_bytes,
    vision_activation_bytes,
)
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.fsdp import shard_model
from qwen3vl_train.parallel.mesh import build_mesh
from qwen3vl_train.train.build import build_model, describe

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("scaling_table", ROOT / "benchmarks" / "scaling.py")
assert SPEC is not None
assert SPEC.loader is not None
scaling_table = importlib.util.module_from_spec(SPEC)
sys.modules["scaling_table"] = scaling_table
SPEC.loader.exec_module(scaling_table)


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[Ranks]:
    """One process that takes itself for a rank of many; collectives return at once and move nothing."""
    debug = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)  # what DETAIL compares over the ranks needs a store that works
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, rank, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        dist.set_debug_level(debug)


def few_layers(size: str, tune: str) -> Qwen3VLForConditionalGeneration:
    """A released model, on the meta device, with 11 of its decoder layers and 3 vision blocks: all have one shape."""
    arch = scaling_table.PUBLISHED[size]
    vision = replace(arch.vision, depth=3, deepstack_visual_indexes=(0, 1, 2))
    text = replace(arch.text, num_hidden_layers=11)
    return describe(replace(arch, vision=vision, text=text), scaling_table.recipe_for(tune))


def sharded(size: str, tune: str, layout: Layout, ranks: Ranks) -> Qwen3VLForConditionalGeneration:
    model = few_layers(size, tune)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    parallel = ParallelSection(engine="fsdp2", replicate=layout.replicate, shard=layout.shard)
    shard_model(model, build_mesh(parallel, ranks), parallel, torch.bfloat16)
    return model


def bytes_of(model: torch.nn.Module, *, trained: bool) -> int:
    pieces = [to_local(parameter) for parameter in model.parameters() if parameter.requires_grad == trained]
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def test_shapes_are_those_of_released_checkpoints():
    # Counts of the published files; a tied head is counted once.
    counts = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
    for size, count in counts.items():
        assert sum(parameter.numel() for parameter in scaling_table.meta_model(size, "full").parameters()) == count


# torch cuts every tensor into as many views as there are ranks, so only some of the table's lines are tried for 1,024.
SHARDED = [
    ("8B", "full", Layout("fsdp2", 1, 8), 0),
    ("8B", "LoRA", Layout("fsdp2", 1, 8), 7),
    ("8B", "full", Layout("fsdp2", 8, 8), 63),
    ("8B", "LoRA", Layout("fsdp2", 1, 64), 63),
    ("8B", "full", Layout("fsdp2", 1, 1024), 1023),
    ("8B", "full", Layout("fsdp2", 128, 8), 1017),
    ("32B", "LoRA", Layout("fsdp2", 1, 8), 0),
    ("32B", "full", Layout("fsdp2", 1, 64), 40),
    ("32B", "full", Layout("fsdp2", 1, 1024), 1023),
    ("32B", "full", Layout("fsdp2", 16, 64), 511),
]


@pytest.mark.parametrize(("size", "tune", "layout", "rank"), SHARDED)
def test_torch_shards_released_shapes_as_computed(size: str, tune: str, layout: Layout, rank: int):
    memory = rank_memory(few_layers(size, tune), layout, index=rank % layout.shard)
    with fake_ranks(rank, layout.num_ranks) as ranks:
        model = sharded(size, tune, layout, ranks)
        assert bytes_of(model, trained=False) == memory.frozen
        assert bytes_of(model, trained=True) == memory.trained
        units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        assert units == {fsdp_unit(name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("shard", [8, 64, 1024])
@pytest.mark.parametrize("size", ["8B", "32B"])
def test_shards_are_even_and_padding_is_counted(size: str, shard: int):
    memory = rank_memory(scaling_table.meta_model(size, "full"), Layout("fsdp2", 1, shard))
    # Rows of all large matrices divide by 8 and 64. By 1,024 those of the vision tower (1152, 3456, 4304) and of the
    # vocabulary (151936) do not, nor do norms of 128: their last ranks hold less or nothing.
    assert memory.padding <= {8: 0.0, 64: 1e-3, 1024: 0.025}[shard]
    for rows in (128, 1152, 4304, 151936):
        assert sum(rows_of_shard(rows, shard, index) for index in range(shard)) == rows


def test_uneven_rows_leave_the_last_ranks_with_less():
    assert [rows_of_shard(10, 4, index) for index in range(4)] == [3, 3, 3, 1]
    assert [rows_of_shard(9, 8, index) for index in range(8)] == [2, 2, 2, 2, 1, 0, 0, 0]


class Traffic(TorchDispatchMode):
    """Bytes that a ring would send out of this rank, by collective."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.sent = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.partition(".")[0]
        if name == "_allgather_base_":  # (output, input)
            self.sent["all_gather"] += args[1].numel() * args[1].element_size() * (self.world_size - 1)
        if name == "_reduce_scatter_base_":
            self.sent["reduce_scatter"] += args[0].numel() * args[0].element_size() * (self.world_size - 1)
        if name == "allreduce_":
            self.sent["all_reduce"] += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        return func(*args, **(kwargs or {}))


TUNES = {
    "full": {"method": "full", "train": ["all"]},
    "vision frozen": {"method": "full", "train": ["text", "merger", "deepstack"]},
    "text LoRA": {"method": "lora", "rank": 4, "targets": ["text_attn", "text_mlp"]},
    "mergers alone": {"method": "full", "train": ["merger", "deepstack"]},
    "embedding of the tower": {"method": "full", "train": ["vision_embed", "text"]},
    "vision and text LoRA": {"method": "lora", "rank": 4, "targets": ["vision_attn", "text_attn"]},
}


@pytest.mark.parametrize("layout", [Layout("fsdp2", 1, 8), Layout("fsdp2", 2, 4)], ids=["fsdp2", "hsdp"])
@pytest.mark.parametrize("tune", TUNES.values(), ids=list(TUNES))
def test_a_pass_sends_what_is_computed(tiny_folder: Path, tune: dict, layout: Layout):
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"path": str(tiny_folder), "dtype": "bfloat16"},
            "tune": tune,
            "data": {"train": [{"path": "x"}]},
            "parallel": {"engine": "fsdp2", "replicate": layout.replicate, "reshard_after_forward": True},
        }
    )
    parts = [{"type": "image", "image": Image.new("RGB", (64, 96))}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Black."}]
    batch = MultimodalCollator.from_pretrained(tiny_folder)([{"messages": turns}])
    plain = build_model(recipe, device="cpu")
    with fake_ranks(0, layout.num_ranks) as ranks:
        model = build_model(recipe, device="cpu", mesh=build_mesh(recipe.parallel, ranks))
        model.train()
        with Traffic(layout.shard) as traffic:
            loss_sum, _ = model(batch)
            loss_sum.backward()
    memory = rank_memory(plain, layout)
    assert traffic.sent["all_gather"] + traffic.sent["reduce_scatter"] == memory.sent_in_shard
    # A ring of two sends all of a piece: half of it to be summed, half of it summed.
    assert traffic.sent["all_reduce"] == memory.sent_between_replicas


def test_activation_bytes_are_near_published_figures():
    # MB a token and KB a patch of fused bfloat16 training, each counted by hand tensor by tensor elsewhere: 10% for
    # what is kept or recomputed by one kernel or another.
    for size, megabytes in (("2B", 1.9), ("4B", 3.8), ("8B", 4.7)):
        got = text_activation_bytes(scaling_table.PUBLISHED[size].text, "none") / 1e6
        assert got == pytest.approx(megabytes, rel=0.1)
    for size, kilobytes in (("2B", 840), ("8B", 1040)):
        assert vision_activation_bytes(scaling_table.PUBLISHED[size].vision) / 1e3 == pytest.approx(kilobytes, rel=0.1)


@pytest.mark.parametrize("table", ["table", "shape_table"])
def test_tables_in_docs_are_the_computed_ones(table: str):
    computed = getattr(scaling_table, table)()
    assert computed in (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
