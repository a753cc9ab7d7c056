"""The data of a run, opened from its recipe: training loader, held-out packs, and the rows that cannot be used."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe
from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.open import cost_model, length_rule, open_collator, pack_limits
from qwen3vl_train.data.packing.index import Index, build_index, check_rejects
from qwen3vl_train.data.packing.loader import TrainLoader, eval_packs
from qwen3vl_train.data.packing.mixture import InOrder, Part, Shuffled
from qwen3vl_train.data.packing.plan import PackLimits, plan_figures
from qwen3vl_train.data.packing.steps import StepPacks
from qwen3vl_train.data.packing.stream import StreamLoader
from qwen3vl_train.data.rejects import KnownRejects
from qwen3vl_train.data.rows.parse import shapes_line, source_of
from qwen3vl_train.data.sources import FileSource, StreamSource, open_sources, open_stream
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.data.sources.hub import HubSource
from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast
from qwen3vl_train.tracking.console import IndexProgress
from qwen3vl_train.train.consistency import Held, check_same_data, plan_fault

_SHOWN = 3
"""Rejected rows that a message lists."""
_PEEKED_ROWS = 64
"""Of each part of a stream, read before it begins to say what shapes rows have."""

EvalPass = Callable[[list[Reject]], Iterator[PackedBatch]]
"""Starts a pass over this rank's share of held-out packs; rows that break while decoding are put on the list."""


@dataclass
class TrainingData:
    """loader: steps of this rank. evals: by name. files: what was indexed, the training files first.

    index: of the training files, without rows where they are streamed. rejects: rows of all files that cannot be used,
    each once. num_stream_rejects: times that a row of a stream was met that cannot be used, and stream_rejects: the
    first of them. stream_shapes: of the first rows of each stream, by its name, as `data.shapes`.
    """

    loader: TrainLoader | StreamLoader
    index: Index
    evals: dict[str, EvalPass]
    files: list[tuple[Index, list[FileSource]]]
    max_rejected_fraction: float
    rejects: KnownRejects = field(default_factory=KnownRejects)
    num_stream_rejects: int = 0
    stream_rejects: list[Reject] = field(default_factory=list)
    stream_shapes: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._indexes_of: dict[str, list[Index]] = {}  # by file; twice where two entries name it
        for index, sources in self.files:
            for source in sources:
                self._indexes_of.setdefault(source.name, []).append(index)
        self.rejects.add(self.found_rejects())

    @property
    def num_steps(self) -> int:
        assert self.loader.num_steps is not None, "recipes with streams have train.num_steps"
        return self.loader.num_steps

    def take(self, steps: Iterator[StepPacks], ranks: Ranks) -> tuple[StepPacks, float]:
        """Return the next step, and the seconds that this rank waited for it. Every rank must call it.

        Its `rejected` are those of all ranks. Raises on every rank: what any rank met on the way, and RuntimeError
        where the ranks have not planned the same step.
        """
        started = time.perf_counter()
        step: Any = None
        fault: Exception | None = None
        try:
            step = next(steps)
        except Exception as error:  # whatever it is, the others must not train without this rank
            fault = error
        waited = time.perf_counter() - started
        mark, rejected = (-1.0, 0.0) if fault else (float(step.mark.both()), float(len(step.rejected)))
        highest, negated_lowest, most_rejected = ranks.reduce([mark, -mark, rejected], "max")
        if negated_lowest == 1.0:
            ranks.raise_together(fault)
        if highest != -negated_lowest:
            raise RuntimeError(plan_fault(step.state["steps_done"], ranks.gather(list(step.mark))))
        if most_rejected:
            step = replace(step, rejected=[reject for of_rank in ranks.gather(step.rejected) for reject in of_rank])
        if isinstance(self.loader, StreamLoader):
            self.num_stream_rejects += len(step.rejected)
            self.stream_rejects = (self.stream_rejects + step.rejected)[:_SHOWN]
        return step, waited

    def found_rejects(self) -> list[Reject]:
        """Rows of indexed files that cannot be used, in the order they were found."""
        return [reject for index, _ in self.files for reject in index.rejects]

    def add_rejects(self, rejects: list[Reject]) -> list[Reject]:
        """Take note of rows that turned out broken after the files were indexed, or in a stream.

        Returns those not known before, each once.
        """
        new = self.rejects.add(rejects)
        for reject in new:
            for index in self._indexes_of.get(reject.file, []):
                index.rejects.append(reject)
        return new

    def share_rejects(self, rejected: list[Reject], ranks: Ranks) -> list[Reject]:
        """Note the rows that broke while decoding on any rank. Every rank must call it, and gets those that are new."""
        if not ranks.any(bool(rejected)):
            return []
        return self.add_rejects([reject for of_rank in ranks.gather(rejected) for reject in of_rank])

    def rejects_state(self) -> dict[str, int]:
        """What a checkpoint keeps of the rejected rows; which they are is in `rejected.jsonl`."""
        return {"listed": len(self.rejects), "of_streams": self.num_stream_rejects}

    def load_rejects(self, state: dict[str, int], saved: list[Reject]) -> None:
        """Go on with the rejects of a checkpoint. saved: of those listed then, what `rejected.jsonl` still holds."""
        self.add_rejects(saved)
        self.rejects.add_unnamed(state["listed"] - len(saved))
        self.num_stream_rejects = state["of_streams"]
        self.stream_rejects = [reject for reject in saved if reject.file not in self._indexes_of][:_SHOWN]

    def check_rejects(self) -> None:
        """Raise ValueError where a larger share of the rows is rejected than `data.max_rejected_fraction` allows."""
        for index, sources in self.files:
            check_rejects(index, sources, self.max_rejected_fraction)
        if isinstance(self.loader, StreamLoader):
            # Both count a row as often as it is met: of a stream it is not known how many it has.
            seen, rejected = self.loader.num_seen, self.num_stream_rejects
            if rejected > self.max_rejected_fraction * seen:
                shown = "".join(f"\n  - {reject}" for reject in self.stream_rejects)
                raise ValueError(
                    f"data: {rejected} of the first {seen} rows cannot be used, more than "
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
            lines = [f"data: streamed from {names}, packed {self.loader.window:,} rows at a time"]
            return lines + [f"data: begins with {shapes_line(*found)}" for found in self.stream_shapes.items()]
        index, loader = self.index, self.loader
        packs = loader.epoch_packs(loader.epoch)
        figures = plan_figures(
            [int(index.tokens[pack].sum()) for pack in packs],
            [int(loader.work[pack].sum()) for pack in packs],
            max_tokens=loader.max_tokens,
            packs_per_step=loader.packs_per_step,
            world_size=loader.world_size,
        )
        lines = [
            f"data: {index.num_usable:,} samples, {int(index.tokens.sum()):,} tokens of which "
            f"{int(index.visual_tokens.sum()):,} visual; {len(packs):,} packs in epoch {loader.epoch + 1}, "
            f"{100 * figures.fill:.1f}% filled; {self.num_steps:,} steps, the busiest rank does "
            f"{figures.balance:.3f} of the mean"
        ]
        lines += [f"data: {shapes_line(name, counts)}" for name, counts in self.shapes().items()]
        if index.num_dropped or index.num_shrunk.any():
            lines.append(
                f"data: {index.num_dropped:,} samples dropped as too long, "
                f"{int(index.num_shrunk.sum()):,} images and clips shrunk to a budget"
            )
        if found := self.found_rejects():
            lines.append(f"data: {len(self.rejects):,} rows rejected, listed in rejected.jsonl; the first: {found[0]}")
        return lines


def open_data(recipe: Recipe, ranks: Ranks, *, loader_state: dict[str, Any] | None = None) -> TrainingData:
    """Read headers and texts of all files, plan packs, and stand where `loader_state` says.

    Every rank must call it: all open the files, rank 0 looks at the rows. Raises ValueError on every rank for files
    that cannot be read on any, that are not the same on all, data that changed. How many rows may be rejected is not
    looked at here: see `TrainingData.check_rejects`.
    """
    data = recipe.data
    opened = ranks.on_all(lambda: _open(recipe))
    check_same_data(opened.held(), ranks)

    def look_on_main(sources: Sequence[FileSource]) -> Index:
        with IndexProgress() as progress:

            def went_on(done: int, total: int) -> None:
                ranks.heartbeat()
                progress(done, total)

            return build_index(
                sources, opened.collate, length_rule(data), num_workers=len(os.sched_getaffinity(0)),
                cache_folder=cache_folder() / "index", progress=went_on,
            )  # fmt: skip

    def look_at(sources: Sequence[FileSource]) -> Index:
        return ranks.on_main(lambda: look_on_main(sources))

    loader, index = _make_loader(recipe, ranks, opened, look_at)
    # Where it is made of the times of files, machines with copies of their own do not share it.
    loader.fingerprint = ranks.on_main(lambda: loader.fingerprint)
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    files = [] if opened.streams else [(index, opened.train_files())]
    evals: dict[str, EvalPass] = {}
    for name, sources in opened.evals.items():
        looked_at = [(file, look_at([file])) for file in sources]
        files += [(eval_index, [file]) for file, eval_index in looked_at]
        evals[name] = partial(_packs, looked_at, opened.collate, pack_limits(data), ranks, data.num_workers)
    opening = TrainingData(loader, index, evals, files, data.max_rejected_fraction)
    if isinstance(loader, StreamLoader):
        opening.stream_shapes = ranks.on_main(lambda: _first_shapes(loader, recipe.train.seed))
    return opening


def _first_shapes(loader: StreamLoader, seed: int) -> dict[str, Counter[str]]:
    """Read the first rows of each part. Raises ValueError where that is not possible."""
    counts: dict[str, Counter[str]] = {}
    for part in loader.parts:
        for row in islice(part.reader.rows(None, (seed,)), _PEEKED_ROWS):
            if not isinstance(row.sample, RowFault):
                counts.setdefault(source_of(row.sample.sample_id), Counter())[row.sample.shape] += 1
    return counts


@dataclass(frozen=True)
class _Opened:
    """What this rank has opened. train: with weight and, of streams, number of rows. evals: by name."""

    collate: MultimodalCollator
    train: list[tuple[FileSource | StreamSource, TrainSource]]
    evals: dict[str, list[FileSource]]

    @property
    def streams(self) -> bool:
        return any(entry.streaming for _, entry in self.train)

    def train_files(self) -> list[FileSource]:
        return [source for source, _ in self.train if isinstance(source, FileSource)]

    def held(self) -> Held:
        """Name and content of everything that must be the same on every rank, as JSON."""
        sources = [source for source, _ in self.train] + [file for files in self.evals.values() for file in files]
        return [("the template, the tokenizer or a budget", self.collate.fingerprint())] + [
            (source.name, _content(source)) for source in sources
        ]


def _content(source: FileSource | StreamSource) -> dict[str, Any]:
    """Return what a source holds, without the times of files, which machines with copies of their own do not share."""
    rows = {"rows": len(source)} if isinstance(source, FileSource) else {}
    if isinstance(source, HubSource):  # its fingerprint is made of a time
        return rows
    return {**rows, **{key: value for key, value in source.fingerprint().items() if key != "times"}}


def _open(recipe: Recipe) -> _Opened:
    data = recipe.data
    evals: dict[str, list[FileSource]] = {}
    train: list[tuple[FileSource | StreamSource, TrainSource]] = []
    collate = open_collator(recipe)
    for entry in data.train:
        train += [(source, entry) for source in ([open_stream(entry)] if entry.streaming else open_sources(entry))]
    for held_out in data.eval:
        name = held_out.name or Path(held_out.path).stem
        if name in evals:
            raise ValueError(f"data.eval: two files are called {name}; give one of them a name")
        evals[name] = open_sources(held_out)
    return _Opened(collate, train, evals)


def _make_loader(
    recipe: Recipe, ranks: Ranks, opened: _Opened, look_at: Callable[[Sequence[FileSource]], Index]
) -> tuple[TrainLoader | StreamLoader, Index]:
    """Return the loader, and the index it plans from, which is empty where a source is a stream."""
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
    if not opened.streams:
        index = look_at(opened.train_files())
        weighted = [(source, entry.weight) for source, entry in opened.train if isinstance(source, FileSource)]
        return TrainLoader(weighted, opened.collate, index, **options), index
    parts = [
        Part(Shuffled(source) if isinstance(source, FileSource) else InOrder(source, entry.num_rows), entry.weight)
        for source, entry in opened.train
    ]
    options |= {"window": data.stream_window, "broadcast": StoreBroadcast(ranks) if ranks.world_size > 1 else None}
    return StreamLoader(parts, opened.collate, length_rule(data), **options), Index.from_sources([], [])


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
