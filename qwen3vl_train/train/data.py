"""The data of a run, opened from its recipe: training loader, held-out packs, and the rows that cannot be used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject
from qwen3vl_train.data.index import Index, build_index, check_rejects
from qwen3vl_train.data.loader import TrainLoader, eval_packs
from qwen3vl_train.data.sources import FileSource, open_sources
from qwen3vl_train.dist import Ranks

EvalPass = Callable[[list[Reject]], Iterator[PackedBatch]]
"""Starts a pass over this rank's share of held-out packs; rows that break while decoding are put on the list."""


@dataclass
class TrainingData:
    """loader: steps of this rank. evals: by name. files: what was indexed, the training files first."""

    loader: TrainLoader
    index: Index
    evals: dict[str, EvalPass]
    files: list[tuple[Index, list[FileSource]]]
    max_rejected_fraction: float

    @property
    def num_steps(self) -> int:
        return self.loader.num_steps

    @property
    def rejects(self) -> list[Reject]:
        """Rows of all files that cannot be used, each once, in the order they were found."""
        found = {(reject.file, reject.row): reject for index, _ in self.files for reject in index.rejects}
        return list(found.values())

    def add_rejects(self, rejects: list[Reject]) -> list[Reject]:
        """Take note of rows that turned out broken after the files were indexed; returns those not known before."""
        known = {(reject.file, reject.row) for reject in self.rejects}
        new = {(reject.file, reject.row): reject for reject in rejects if (reject.file, reject.row) not in known}
        for index, sources in self.files:
            names = {source.name for source in sources}
            index.rejects += [reject for reject in new.values() if reject.file in names]
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

    def report_lines(self) -> list[str]:
        """What the terminal says of the data."""
        index = self.index
        packs = self.loader.epoch_packs(0)
        filled = sum(int(index.tokens[pack].sum()) for pack in packs) / (len(packs) * self.loader.max_tokens)
        lines = [
            f"data: {index.num_usable:,} samples, {int(index.tokens.sum()):,} tokens of which "
            f"{int(index.visual_tokens.sum()):,} visual; {len(packs):,} packs in epoch 1, {100 * filled:.1f}% filled; "
            f"{self.num_steps:,} steps"
        ]
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
        fps=data.fps,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        video_markup=recipe.model.video_markup,
    )


def open_data(recipe: Recipe, ranks: Ranks, *, loader_state: dict[str, Any] | None = None) -> TrainingData:
    """Read headers and texts of all files, plan packs, and stand where `loader_state` says.

    Raises ValueError for files that cannot be read, nothing to learn from, data that changed. How many rows may be
    rejected is not looked at here: see `TrainingData.check_rejects`.
    """
    data, train = recipe.data, recipe.train
    collate = open_collator(recipe)
    limits = {"max_tokens": data.max_tokens_per_pack, "max_rejected_fraction": 1.0}
    sources = [(opened, source.weight) for source in data.train for opened in open_sources(source)]
    index = build_index([source for source, _ in sources], collate, **limits)
    loader = TrainLoader(
        sources,
        collate,
        index,
        packs_per_step=train.packs_per_step,
        max_tokens_per_pack=data.max_tokens_per_pack,
        seed=train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=data.num_workers,
        num_epochs=train.num_epochs if train.num_steps is None else None,
        num_steps=train.num_steps,
        pin_memory=ranks.device.type == "cuda",
    )
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    files = [(index, [source for source, _ in sources])]
    evals: dict[str, EvalPass] = {}
    for source in data.eval:
        opened = [(file, build_index([file], collate, **limits)) for file in open_sources(source)]
        files += [(eval_index, [file]) for file, eval_index in opened]
        name = source.name or Path(source.path).stem
        if name in evals:
            raise ValueError(f"data.eval: two files are called {name}; give one of them a name")
        evals[name] = partial(_packs, opened, collate, data.max_tokens_per_pack, ranks, data.num_workers)
    return TrainingData(loader, index, evals, files, data.max_rejected_fraction)


def _packs(
    files: Sequence[tuple[FileSource, Index]],
    collate: MultimodalCollator,
    max_tokens: int,
    ranks: Ranks,
    num_workers: int,
    rejected: list[Reject],
) -> Iterator[PackedBatch]:
    for file, index in files:
        for result in eval_packs(
            file,
            collate,
            index,
            max_tokens=max_tokens,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=num_workers,
        ):
            rejected += result.rejected
            if result.pack is not None:
                yield result.pack
