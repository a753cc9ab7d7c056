"""The data of a run, opened from its recipe: training loader, held-out packs, and the rows that cannot be used."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe, run_dir
from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.open import cost_model, length_rule, open_collator, pack_limits
from qwen3vl_train.data.packing.index import Index, build_index
from qwen3vl_train.data.packing.loader import Loader, StepPacks
from qwen3vl_train.data.packing.mixture import InOrder, Part, Shuffled
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import PackLimits, plan_figures
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.packing.windows import IndexedWindows, WindowProducer
from qwen3vl_train.data.rejects import REJECTED_FILE, RejectLedger
from qwen3vl_train.data.rows.parse import dataset_of, format_counts
from qwen3vl_train.data.sources import FileSource, StreamSource, open_sources, open_stream
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.data.sources.hub import HubSource
from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast
from qwen3vl_train.tracking.console import IndexProgress
from qwen3vl_train.train.consistency import DataContents, StepStatus, check_same_data, plan_error

_PEEKED_ROWS = 64
"""Of each part of a stream, read before it begins to say what shapes rows have."""

EvalPass = Callable[[list[Reject]], Iterator[PackedBatch]]
"""Starts a pass over this rank's share of held-out packs; rows that break while decoding are put on the list."""


class TakenStep(NamedTuple):
    """The packs of a step on this rank, what is true on any rank, and the seconds that this rank waited for the packs.

    packs: `rejected` are the rows of all ranks.
    """

    packs: StepPacks
    status: StepStatus
    wait_seconds: float


@dataclass
class TrainingData:
    """The data of a run.

    loader: the training steps of this rank.
    index: of the training files, without rows where they are streamed.
    evals: starts a pass over held-out files, by name.
    files: what was indexed, the training files first.
    rejects: the ledger of rejected rows.
    stream_shapes: number of rows of each shape among the first of each stream, by its name, as `shapes`.
    """

    loader: Loader
    index: Index
    evals: dict[str, EvalPass]
    files: list[tuple[Index, list[FileSource]]]
    rejects: RejectLedger
    stream_shapes: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def is_streamed(self) -> bool:
        return isinstance(self.loader.producer, StreamedWindows)

    @property
    def num_steps(self) -> int:
        assert self.loader.num_steps is not None, "recipes with streams have train.num_steps"
        return self.loader.num_steps

    def take(
        self, steps: Iterator[StepPacks], ranks: Ranks, *, stop_requested: bool = False, save_failed: bool = False
    ) -> TakenStep:
        """Return the next step. Every rank must call it.

        Raises on every rank: the error that any rank met, and RuntimeError where the ranks have planned different
        steps. stop_requested, save_failed: of this rank, for the status of all.
        """
        started = time.perf_counter()
        packs: Any = None
        error: Exception | None = None
        try:
            packs = next(steps)
        except Exception as caught:  # of any type: the other ranks must not train without this one
            error = caught
        wait_seconds = time.perf_counter() - started
        status = StepStatus.reduce(
            ranks,
            plan_hash=None if error else packs.plan_hash.combined(),
            has_rejects=not error and bool(packs.rejected),
            stop_requested=stop_requested,
            save_failed=save_failed,
        )
        if status.failed:
            ranks.raise_together(error)
        if status.plan_differs:
            raise plan_error(packs.state["steps_done"], ranks.gather(list(packs.plan_hash)))
        if status.has_rejects:
            packs = replace(packs, rejected=gather_rejects(packs.rejected, ranks))
        return TakenStep(packs, status, wait_seconds)

    def shapes(self) -> dict[str, Counter[str]]:
        """How many rows of each data set have which shape, by its name; held-out ones as `eval NAME`."""
        counts: dict[str, Counter[str]] = {}
        for place, (index, sources) in enumerate(self.files):
            for number, source in enumerate(sources):
                name = dataset_of(source.rules.sample_id(source.file, 1))
                counts.setdefault(f"eval {name}" if place else name, Counter()).update(index.count_shapes(number))
        return counts

    def summary(self) -> list[str]:
        """Return the lines that the start banner shows about the data."""
        if isinstance(self.loader.producer, StreamedWindows):
            names = ", ".join(part.name for part in self.loader.producer.parts)
            lines = [f"data: streamed from {names}, packed {self.loader.producer.size:,} rows at a time"]
            return lines + [f"data: begins with {format_counts(*found)}" for found in self.stream_shapes.items()]
        index, loader = self.index, self.loader
        packs = loader.epoch_packs(loader.epoch)
        figures = plan_figures(
            [pack.tokens for pack in packs],
            [pack.work for pack in packs],
            max_tokens=loader.limits.tokens,
            packs_per_step=loader.packs_per_step,
            world_size=loader.data_world_size,
        )
        lines = [
            f"data: {index.num_usable:,} samples, {int(index.tokens.sum()):,} tokens of which "
            f"{int(index.visual_tokens.sum()):,} visual; {len(packs):,} packs in epoch {loader.epoch + 1}, "
            f"{100 * figures.fill:.1f}% filled; {self.num_steps:,} steps, the busiest rank does "
            f"{figures.balance:.3f} of the mean"
        ]
        lines += [f"data: {format_counts(name, counts)}" for name, counts in self.shapes().items()]
        if index.num_dropped or index.num_shrunk.any():
            lines.append(
                f"data: {index.num_dropped:,} samples dropped as too long, "
                f"{int(index.num_shrunk.sum()):,} images and clips shrunk to a budget"
            )
        if found := self.rejects.indexed:
            lines.append(f"data: {len(self.rejects):,} rows rejected, listed in rejected.jsonl; the first: {found[0]}")
        return lines


def gather_rejects(rejects: list[Reject], ranks: Ranks) -> list[Reject]:
    """Return the rejected rows of all ranks, in rank order. Every rank must call it."""
    return [reject for of_rank in ranks.gather(rejects) for reject in of_rank]


def open_data(recipe: Recipe, ranks: Ranks, *, loader_state: dict[str, Any] | None = None) -> TrainingData:
    """Read headers and texts of all files, plan packs, and stand where `loader_state` says.

    Every rank must call it: all open the files, rank 0 looks at the rows. Raises ValueError on every rank for files
    that cannot be read on any, that are not the same on all, data that changed. How many rows may be rejected is not
    checked here: see `RejectLedger.resume`.
    """
    data = recipe.data
    opened = ranks.on_all(lambda: _open(recipe))
    check_same_data(opened.contents(), ranks)

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
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    files = [] if opened.streams else [(index, opened.train_files())]
    evals: dict[str, EvalPass] = {}
    for name, sources in opened.evals.items():
        looked_at = [(file, look_at([file])) for file in sources]
        files += [(eval_index, [file]) for file, eval_index in looked_at]
        evals[name] = partial(_packs, looked_at, opened.collate, pack_limits(data), ranks, data.num_workers)
    rejects = RejectLedger(run_dir(recipe) / REJECTED_FILE, data.max_rejected_fraction, writes=ranks.is_main)
    for of_files, sources in files:
        rejects.add_index(
            [source.name for source in sources],
            num_rows=of_files.num_rows,
            num_usable=of_files.num_usable,
            rejects=of_files.rejects,
        )
    opening = TrainingData(loader, index, evals, files, rejects)
    if isinstance(producer := loader.producer, StreamedWindows):
        opening.stream_shapes = ranks.on_main(lambda: _first_shapes(producer.parts, recipe.train.seed))
    return opening


def _first_shapes(parts: Sequence[Part], seed: int) -> dict[str, Counter[str]]:
    """Read the first rows of each part. Raises ValueError where that is not possible."""
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        for row in islice(part.reader.rows(None, (seed,)), _PEEKED_ROWS):
            if not isinstance(row.sample, RowFault):
                counts.setdefault(dataset_of(row.sample.sample_id), Counter())[row.sample.row_format] += 1
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

    def contents(self) -> DataContents:
        """Return name and content of everything that must be equal on every rank, as JSON."""
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
) -> tuple[Loader, Index]:
    """Return the loader, and the index it plans from, which is empty where a source is a stream."""
    data, train = recipe.data, recipe.train
    index = Index.from_sources([], []) if opened.streams else look_at(opened.train_files())
    producer = _make_producer(recipe, ranks, opened, index)
    loader = Loader(
        producer,
        opened.collate,
        packs_per_step=train.packs_per_step,
        limits=pack_limits(data),
        num_epochs=train.num_epochs if train.num_steps is None else None,
        num_steps=train.num_steps,
        data_rank=ranks.rank,
        data_world_size=ranks.world_size,
        num_workers=data.num_workers,
        pin_memory=ranks.device.type == "cuda",
        # Where it is made of the times of files, machines with copies of their own do not share it.
        fingerprint=ranks.on_main(producer.fingerprint),
    )
    return loader, index


def _make_producer(recipe: Recipe, ranks: Ranks, opened: _Opened, index: Index) -> WindowProducer:
    """Return what makes windows of the training rows. index: of all of them, unless a source is a stream."""
    data, seed, cost = recipe.data, recipe.train.seed, cost_model(recipe)
    if not opened.streams:
        weighted = [(source, entry.weight) for source, entry in opened.train if isinstance(source, FileSource)]
        return IndexedWindows(weighted, index, seed=seed, cost_model=cost)
    parts = [
        Part(Shuffled(source) if isinstance(source, FileSource) else InOrder(source, entry.num_rows), entry.weight)
        for source, entry in opened.train
    ]
    return StreamedWindows(
        parts,
        opened.collate,
        length_rule(data),
        seed=seed,
        size=data.stream_window,
        cost_model=cost,
        broadcast=StoreBroadcast(ranks) if ranks.world_size > 1 else None,
        is_scanner=ranks.is_main,
        in_worker=data.num_workers > 0,
    )


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
            data_rank=ranks.rank,
            data_world_size=ranks.world_size,
            num_workers=num_workers,
        ):
            rejected += result.rejected
            if result.pack is not None:
                yield result.pack
