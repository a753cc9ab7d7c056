"""The data of a run, opened from its recipe: training loader, held-out packs, and the rows that cannot be used."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import DataSection, Recipe
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject
from qwen3vl_train.data.index import Index, LengthRule, build_index, check_rejects
from qwen3vl_train.data.loader import TrainLoader, eval_packs
from qwen3vl_train.data.mixture import InOrder, Part, Shuffled
from qwen3vl_train.data.plan import CostModel, PackLimits, plan_figures
from qwen3vl_train.data.rows import shapes_line, source_of
from qwen3vl_train.data.sources import FileSource, open_sources, open_stream
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.data.stream import StreamLoader
from qwen3vl_train.dist import Ranks
from qwen3vl_train.groups import VISION_GROUPS
from qwen3vl_train.train.progress import IndexProgress

EvalPass = Callable[[list[Reject]], Iterator[PackedBatch]]
"""Starts a pass over this rank's share of held-out packs; rows that break while decoding are put on the list."""


@dataclass
class TrainingData:
    """loader: steps of this rank. evals: by name. files: what was indexed, the training files first.

    index: of the training files, without rows where they are streamed. streamed: rows of streams that cannot be used.
    """

    loader: TrainLoader | StreamLoader
    index: Index
    evals: dict[str, EvalPass]
    files: list[tuple[Index, list[FileSource]]]
    max_rejected_fraction: float
    streamed: list[Reject] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        assert self.loader.num_steps is not None, "recipes with streams have train.num_steps"
        return self.loader.num_steps

    @property
    def rejects(self) -> list[Reject]:
        """Rows of all files that cannot be used, each once, in the order they were found."""
        of_files = [reject for index, _ in self.files for reject in index.rejects]
        return list({(reject.file, reject.row): reject for reject in of_files + self.streamed}.values())

    def add_rejects(self, rejects: list[Reject]) -> list[Reject]:
        """Take note of rows that turned out broken after the files were indexed, or in a stream.

        Returns those not known before.
        """
        known = {(reject.file, reject.row) for reject in self.rejects}
        new = {(reject.file, reject.row): reject for reject in rejects if (reject.file, reject.row) not in known}
        indexed = {source.name for _, sources in self.files for source in sources}
        for index, sources in self.files:
            names = {source.name for source in sources}
            index.rejects += [reject for reject in new.values() if reject.file in names]
        self.streamed += [reject for reject in new.values() if reject.file not in indexed]
        return list(new.values())

    def share_rejects(self, rejected: list[Reject], ranks: Ranks) -> list[Reject]:
        """Note the rows that broke while decoding on any rank. Every rank must call it, and gets those that are new."""
        (count,) = ranks.sum([float(len(rejected))])
        if not count:
            return []
        return self.add_rejects([reject for of_rank in ranks.gather(rejected) for reject in of_rank])

    def check_rejects(self) -> None:
        """Raise ValueError where a larger share of the rows is rejected than `data.max_rejected_fraction` allows."""
        for index, sources in self.files:
            check_rejects(index, sources, self.max_rejected_fraction)
        if isinstance(self.loader, StreamLoader):
            seen, rejected = self.loader.num_seen, self.streamed
            if len(rejected) > self.max_rejected_fraction * seen:
                shown = "".join(f"\n  - {reject}" for reject in rejected[:3])
                raise ValueError(
                    f"data: {len(rejected)} of the first {seen} rows cannot be used, more than "
                    f"data.max_rejected_fraction {self.max_rejected_fraction:g}; mend them or raise it{shown}"
                )

    def shapes(self) -> dict[str, Counter[str]]:
        """How many rows of each data set have which shape, by its name; held-out ones as `eval NAME`."""
        counts: dict[str, Counter[str]] = {}
        for place, (index, sources) in enumerate(self.files):
            for number, source in enumerate(sources):
                name = source_of(source.rules.sample_id(source.file, 1))
                counts.setdefault(f"eval {name}" if place else name, Counter()).update(index.count_shapes(number))
        return counts

    def report_lines(self) -> list[str]:
        """What the terminal says of the data."""
        if isinstance(self.loader, StreamLoader):
            names = ", ".join(part.name for part in self.loader.parts)
            return [f"data: streamed from {names}, packed {self.loader.window:,} rows at a time"]
        index, loader = self.index, self.loader
        packs = loader.epoch_packs(0)
        figures = plan_figures(
            [int(index.tokens[pack].sum()) for pack in packs],
            [int(loader.work[pack].sum()) for pack in packs],
            max_tokens=loader.max_tokens,
            packs_per_step=loader.packs_per_step,
            world_size=loader.world_size,
        )
        lines = [
            f"data: {index.num_usable:,} samples, {int(index.tokens.sum()):,} tokens of which "
            f"{int(index.visual_tokens.sum()):,} visual; {len(packs):,} packs in epoch 1, {100 * figures.fill:.1f}% "
            f"filled; {self.num_steps:,} steps, the busiest rank does {figures.balance:.3f} of the mean"
        ]
        lines += [f"data: {shapes_line(name, counts)}" for name, counts in self.shapes().items()]
        if index.num_dropped or index.num_shrunk.any():
            lines.append(
                f"data: {index.num_dropped:,} samples dropped as too long, "
                f"{int(index.num_shrunk.sum()):,} images and clips shrunk to a budget"
            )
        if rejects := self.rejects:
            lines.append(f"data: {len(rejects)} rows rejected, listed in rejected.jsonl; the first: {rejects[0]}")
        return lines


def open_collator(recipe: Recipe) -> MultimodalCollator:
    """The collator of the recipe's checkpoint, with the recipe's budgets and its sampling of clips."""
    data = recipe.data
    return MultimodalCollator.from_pretrained(
        recipe.model.path,
        max_visual_tokens_per_image=data.max_visual_tokens_per_image,
        min_visual_tokens_per_image=data.min_visual_tokens_per_image,
        max_visual_tokens_per_video=data.max_visual_tokens_per_video,
        max_visual_tokens_per_sample=data.max_visual_tokens_per_sample,
        shrink_to_tokens=length_rule(data).max_tokens if data.too_long == "shrink_media" else None,
        shrink_to_patches=data.max_patches_per_pack if data.too_long == "shrink_media" else None,
        fps=data.fps,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        video_markup=recipe.model.video_markup,
    )


def length_rule(data: DataSection) -> LengthRule:
    """What becomes of samples that are too long."""
    field = "max_tokens_per_pack" if data.max_tokens_per_sample is None else "max_tokens_per_sample"
    return LengthRule(getattr(data, field), f"data.{field}", data.max_patches_per_pack, data.too_long)


def pack_limits(data: DataSection) -> PackLimits:
    return PackLimits(data.max_tokens_per_pack, data.max_patches_per_pack, data.max_sequences_per_pack)


def cost_model(recipe: Recipe) -> CostModel:
    """The work of samples in the recipe's model, with what it trains."""
    trained, of_trained = recipe.tune.trained_groups(), 3 if recipe.tune.method == "full" else 2
    sees = recipe.tune.has_patterns() or any(group in VISION_GROUPS for group in trained)
    reads = any(group.startswith("text") for group in trained)
    return CostModel.of(
        Qwen3VLArch.from_pretrained(recipe.model.path),
        text_passes=of_trained if reads else 2,
        vision_passes=of_trained if sees else 1,
    )


def open_data(recipe: Recipe, ranks: Ranks, *, loader_state: dict[str, Any] | None = None) -> TrainingData:
    """Read headers and texts of all files, plan packs, and stand where `loader_state` says.

    Raises ValueError for files that cannot be read, nothing to learn from, data that changed. How many rows may be
    rejected is not looked at here: see `TrainingData.check_rejects`. Every rank must call it: rank 0 looks at the rows.
    """
    data = recipe.data
    collate = open_collator(recipe)

    def look_on_main(sources: Sequence[FileSource]) -> Index:
        with IndexProgress() as progress:
            return build_index(
                sources, collate, length_rule(data), num_workers=len(os.sched_getaffinity(0)),
                cache_folder=cache_folder() / "index", progress=progress,
            )  # fmt: skip

    def look_at(sources: Sequence[FileSource]) -> Index:
        return ranks.from_main(lambda: look_on_main(sources))

    loader, index, sources = _open_loader(recipe, ranks, collate, look_at)
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    files = [(index, sources)] if sources else []
    evals: dict[str, EvalPass] = {}
    for entry in data.eval:
        opened = [(file, look_at([file])) for file in open_sources(entry)]
        files += [(eval_index, [file]) for file, eval_index in opened]
        name = entry.name or Path(entry.path).stem
        if name in evals:
            raise ValueError(f"data.eval: two files are called {name}; give one of them a name")
        evals[name] = partial(_packs, opened, collate, pack_limits(data), ranks, data.num_workers)
    return TrainingData(loader, index, evals, files, data.max_rejected_fraction)


def _open_loader(
    recipe: Recipe, ranks: Ranks, collate: MultimodalCollator, look_at: Callable[[Sequence[FileSource]], Index]
) -> tuple[TrainLoader | StreamLoader, Index, list[FileSource]]:
    """Return the loader, and the index and files it plans from: both empty where a source is a stream."""
    data, train = recipe.data, recipe.train
    options: dict[str, Any] = {
        "packs_per_step": train.packs_per_step,
        "limits": pack_limits(data),
        "seed": train.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "num_workers": data.num_workers,
        "num_epochs": train.num_epochs if train.num_steps is None else None,
        "num_steps": train.num_steps,
        "cost_model": cost_model(recipe),
        "pin_memory": ranks.device.type == "cuda",
    }
    if not any(entry.streaming for entry in data.train):
        weighted = [(file, entry.weight) for entry in data.train for file in open_sources(entry)]
        sources = [file for file, _ in weighted]
        index = look_at(sources)
        return TrainLoader(weighted, collate, index, **options), index, sources
    parts = []
    for entry in data.train:
        if entry.streaming:
            parts.append(Part(InOrder(open_stream(entry), entry.num_rows), entry.weight))
        else:
            parts += [Part(Shuffled(file), entry.weight) for file in open_sources(entry)]
    loader = StreamLoader(parts, collate, length_rule(data), window=data.stream_window, **options)
    return loader, Index.of([], []), []


def _packs(
    files: Sequence[tuple[FileSource, Index]],
    collate: MultimodalCollator,
    limits: PackLimits,
    ranks: Ranks,
    num_workers: int,
    rejected: list[Reject],
) -> Iterator[PackedBatch]:
    for file, index in files:
        for result in eval_packs(
            file,
            collate,
            index,
            limits=limits,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=num_workers,
        ):
            rejected += result.rejected
            if result.pack is not None:
                yield result.pack
