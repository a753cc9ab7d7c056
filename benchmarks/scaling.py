"""Compute what one rank of many holds and sends, as in RESULTS.md: `python benchmarks/scaling.py` prints the tables."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from qwen3vl_train.arch import Qwen3VLArch, TextArch, VisionArch
from qwen3vl_train.config import Recipe, recipe_from_dict
from qwen3vl_train.model.costs import (
    Layout,
    layer_activation_bytes,
    rank_memory,
    rows_of_shard,
    text_activation_bytes,
)
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import describe

GIB = 2**30
TOKENS = 8192  # in a pack
SMALL_TOWER = VisionArch(24, 1024, 4096, 16, 3, 16, 2, 2, 2048, 2304, (5, 11, 17))
LARGE_TOWER = VisionArch(27, 1152, 4304, 16, 3, 16, 2, 2, 4096, 2304, (8, 16, 24))


def _published(tower: VisionArch, *, hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> Qwen3VLArch:
    return Qwen3VLArch(
        vision=replace(tower, out_hidden_size=hidden),
        text=TextArch(151936, hidden, mlp, layers, heads, 8, 128, 1e-6, 5e6, (24, 20, 20), 262144),
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


PUBLISHED = {
    "2B": _published(SMALL_TOWER, hidden=2048, mlp=6144, layers=28, heads=16, tied=True),
    "4B": _published(SMALL_TOWER, hidden=2560, mlp=9728, layers=36, heads=32, tied=True),
    "8B": _published(LARGE_TOWER, hidden=4096, mlp=12288, layers=36, heads=32, tied=False),
    "32B": _published(LARGE_TOWER, hidden=5120, mlp=25600, layers=64, heads=64, tied=False),
}
TUNES = {
    "LoRA": {"method": "lora", "rank": 16, "targets": ["text_attn", "text_mlp"]},
    "full": {"method": "full", "train": ["text", "merger", "deepstack"]},
}
LAYOUTS = [
    ("LoRA", Layout("ddp", 8, 1)),
    ("LoRA", Layout("ddp", 64, 1)),
    ("LoRA", Layout("ddp", 1024, 1)),
    ("LoRA", Layout("fsdp2", 1, 8)),
    ("LoRA", Layout("fsdp2", 1, 64)),
    ("LoRA", Layout("fsdp2", 128, 8)),
    ("full", Layout("fsdp2", 1, 8)),
    ("full", Layout("fsdp2", 1, 64)),
    ("full", Layout("fsdp2", 8, 8)),
    ("full", Layout("fsdp2", 1, 1024)),
    ("full", Layout("fsdp2", 128, 8)),
    ("full", Layout("fsdp2", 16, 64)),
]


def recipe_for(tune: str) -> Recipe:
    return recipe_from_dict(
        {"name": "x", "model": {"path": "x"}, "tune": TUNES[tune], "data": {"train": [{"path": "x"}]}}
    )


def meta_model(size: str, tune: str) -> Qwen3VLForConditionalGeneration:
    """Return a released model with its tuning, on the meta device: shapes without weights."""
    return describe(PUBLISHED[size], recipe_for(tune))


def rows() -> Iterator[list[str]]:
    for size in ("8B", "32B"):
        text = PUBLISHED[size].text
        activations = TOKENS * (text_activation_bytes(text, "full") + layer_activation_bytes(text))
        models = {tune: meta_model(size, tune) for tune in TUNES}
        for tune, layout in LAYOUTS:
            share = rank_memory(models[tune], layout)
            if layout.engine == "ddp":
                engine = "ddp"
            else:
                engine = f"hsdp {layout.replicate} x {layout.shard}" if layout.replicate > 1 else "fsdp2"
            total = share.held + share.gathered + activations
            sizes = [share.frozen, share.trained, share.moments, share.gradients, share.gathered, activations, total]
            sent = [share.sent_in_shard, share.sent_between_replicas]
            yield [
                size, tune, engine, f"{layout.num_ranks:,}", *(f"{value / GIB:.2f}" for value in [*sizes, *sent]),
                f"{100 * share.padding:.1f}%",
            ]  # fmt: skip


HEAD = [
    "model", "tune", "engine", "ranks", "frozen", "trained", "moments", "gradients", "gathered", "activations",
    "total", "sent in shard", "sent between copies", "padding",
]  # fmt: skip


SHAPES = {
    "q_proj": "language_model.model.layers.0.self_attn.q_proj.weight",
    "k_proj, v_proj": "language_model.model.layers.0.self_attn.k_proj.weight",
    "o_proj, down_proj": "language_model.model.layers.0.mlp.down_proj.weight",
    "gate_proj, up_proj": "language_model.model.layers.0.mlp.gate_proj.weight",
    "embedding, head": "language_model.lm_head.weight",
    "q_norm, k_norm": "language_model.model.layers.0.self_attn.q_norm.weight",
    "vision qkv": "visual.vision.blocks.0.attn.qkv.weight",
    "vision MLP": "visual.vision.blocks.0.mlp.linear_fc1.weight",
    "vision norms": "visual.vision.blocks.0.norm1.weight",
}


def shape_rows() -> Iterator[list[str]]:
    for size in ("8B", "32B"):
        shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(size, "full").named_parameters()}
        for label, name in SHAPES.items():
            num_rows = shapes[name][0]
            cells = []
            for shard in (8, 64, 1024):
                first, last = rows_of_shard(num_rows, shard, 0), rows_of_shard(num_rows, shard, shard - 1)
                full = sum(rows_of_shard(num_rows, shard, rank) == first for rank in range(shard))
                cells.append(f"{first}" if first == last else f"{first} on {full} ranks, {last} on the last")
            if size == "8B" or "vision" not in label:  # the towers of 8B and 32B are equal
                yield [size, label, " x ".join(str(length) for length in shapes[name]), *cells]


def _markdown(head: list[str], num_text_columns: int, lines: Iterator[list[str]]) -> str:
    table = [head, [*["---"] * num_text_columns, *["---:"] * (len(head) - num_text_columns)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def table() -> str:
    """Return what one rank holds and sends, in GiB."""
    return _markdown(HEAD, 3, rows())


def shape_table() -> str:
    """Return how many rows of each kind of tensor one rank holds."""
    return _markdown(["model", "tensor", "shape", "rows of 8", "of 64", "of 1,024"], 3, shape_rows())


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n\n{shape_table()}\n")
