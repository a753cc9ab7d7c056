"""The data of a run, opened from its recipe: training loader, held-out packs, and the rows that cannot be used."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.config import Recipe, run_dir
from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.open import cost_model, length_rule, open_collator, pack_limits
from qwen3vl_train.data.packing.index import Index, build_index
from qwen3vl_train.data.packing.loader import Loader, StepPacks
from qwen3vl_train.data.packing.mixture import InOrder, Numbered, Part
from qwen3vl_train.data.packing.packs import eval_packs
from qwen3vl_train.data.packing.plan import plan_figures
from qwen3vl_train.data.packing.stream import StreamedWindows
from qwen3vl_train.data.packing.windows import IndexedWindows, WindowProducer
from qwen3vl_train.data.rejects import REJECTED_FILE, NoUsableRowError, RejectLedger, RejectSummary
from qwen3vl_train.data.rows.parse import dataset_of, format_counts
from qwen3vl_train.data.selection import OpenedRows, SomeRows, check_names, open_rows
from qwen3vl_train.data.sources import FileSource, StreamSource
from qwen3vl_train.data.sources.files import cache_folder
from qwen3vl_train.data.sources.hub import HubSource
from qwen3vl_train.dist.ranks import Ranks, StoreBroadcast
from qwen3vl_train.public_names import public_name
from qwen3vl_train.tracking.console import IndexProgress
from qwen3vl_train.train.advice import EpochFigures, length_lines
from qwen3vl_train.train.consistency import DataContents, StepStatus, check_same_data, plan_error

_PEEKED_ROWS = 64
"""Rows of each part of a stream that are read at the start to count the formats of rows."""

EvalPass = Callable[[list[Reject]], Iterator[PackedBatch]]
"""Start a pass over this rank's share of held-out packs; rows that fail to decode are appended to the list."""


class TakenStep(NamedTuple):
    """The packs of a step on this rank, what is true on any rank, and the seconds that this rank waited for them."""

    packs: StepPacks  # `rejected` are the rows of all ranks
    status: StepStatus
    wait_seconds: float


@dataclass
class TrainingData:
    """The data of a run."""

    loader: Loader  # the training steps of this rank
    index: Index  # of the training files, without rows where they are streamed
    evals: dict[str, EvalPass]  # by name of the held-out files
    files: list[tuple[Index, list[FileSource]]]  # what was indexed, the training files first
    rejects: RejectLedger
    first_rows: list[str]  # lines about the first rows of each stream

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
        if isinstance(error, NoUsableRowError):  # of a stream; an index has listed its own before
            self.rejects.add(error.rejects)
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

    def count_formats(self) -> dict[str, Counter[str]]:
        """Return how many rows of each data set have which format, by its name; held-out ones as `eval NAME`."""
        counts: dict[str, Counter[str]] = {}
        for place, (index, sources) in enumerate(self.files):
            for number, source in enumerate(sources):
                name = dataset_of(source.rules.sample_id(source.file, 1))
                counts.setdefault(f"eval {name}" if place else name, Counter()).update(index.count_formats(number))
        return counts

    def summary(self) -> list[str]:
        """Return the lines that the start banner shows about the data."""
        if isinstance(self.loader.producer, StreamedWindows):
            names = ", ".join(part.name for part in self.loader.producer.parts)
            lines = [f"data: streamed from {names}, packed {self.loader.producer.size:,} rows at a time"]
            return lines + self.first_rows
        index, loader = self.index, self.loader
        packs = loader.epoch_packs(loader.epoch)
        figures = plan_figures(
            [pack.tokens for pack in packs], [pack.work for pack in packs], max_tokens=loader.limits.tokens,
            packs_per_step=loader.packs_per_step, world_size=loader.data_world_size,
        )  # fmt: skip
        lines = [
            f"data: {index.num_usable:,} samples, {int(index.tokens.sum()):,} tokens of which "
            f"{int(index.visual_tokens.sum()):,} visual; {len(packs):,} packs in epoch {loader.epoch + 1}, "
            f"{100 * figures.fill:.1f}% filled; {self.num_steps:,} steps, the busiest rank does "
            f"{figures.balance:.3f} of the mean"
        ]
        lines += [f"data: {format_counts(name, counts)}" for name, counts in self.count_formats().items()]
        if index.num_dropped or index.num_shrunk.any():
            lines.append(
                f"data: {index.num_dropped:,} samples dropped as too long, "
                f"{int(index.num_shrunk.sum()):,} images and clips shrunk to a budget"
            )
        if found := self.rejects.indexed:
            num_rows = {public_name(source.name): len(source) for _, sources in self.files for source in sources}
            reasons = [f"  - {line}" for line in RejectSummary(found).lines(num_rows)]
            lines += [f"data: {len(self.rejects):,} rows rejected, listed in rejected.jsonl", *reasons]
        return lines

    def length_lines(self, recipe: Recipe) -> list[str]:
        """Return the lines that the start banner shows about the length of the run."""
        epoch = None
        if not self.is_streamed:
            tokens, num_packs = self.index.tokens, len(self.loader.epoch_packs(self.loader.epoch))
            num_steps = math.ceil(num_packs / self.loader.packs_per_step)
            epoch = EpochFigures(self.index.num_usable, num_steps, int(tokens.sum()), int(tokens.max(initial=0)))
        return length_lines(recipe, self.num_steps, epoch, self.loader.data_world_size)


def gather_rejects(rejects: list[Reject], ranks: Ranks) -> list[Reject]:
    """Return the rejected rows of all ranks, in rank order. Every rank must call it."""
    return [reject for of_rank in ranks.gather(rejects) for reject in of_rank]


def open_data(recipe: Recipe, ranks: Ranks, *, loader_state: dict[str, Any] | None = None) -> TrainingData:
    """Read headers and texts of all files, plan packs, and move the loader to `loader_state`.

    Every rank must call it: all open the files, rank 0 scans the rows. Raises ValueError on every rank for files that
    cannot be read on any, files that are not the same on all, and data that changed. How many rows may be rejected is
    not checked here: see `RejectLedger.resume`.
    """
    data = recipe.data
    check_names(recipe.data)
    opened = ranks.on_all(lambda: _Opened(open_collator(recipe), open_rows(recipe)))
    check_same_data(opened.contents(), ranks)

    def build_on_main(sources: Sequence[FileSource]) -> Index:
        with IndexProgress() as progress:

            def report_progress(done: int, total: int) -> None:
                ranks.heartbeat()
                progress(done, total)

            return build_index(
                sources, opened.collate, length_rule(data), num_workers=len(os.sched_getaffinity(0)),
                cache_folder=cache_folder() / "index", progress=report_progress,
            )  # fmt: skip

    def index_files(sources: Sequence[FileSource]) -> Index:
        return ranks.on_main(lambda: build_on_main(sources))

    train_files = [source for source, _ in opened.train if isinstance(source, FileSource)]
    index = Index.from_sources([], []) if opened.streams else index_files(train_files)
    loader = _make_loader(recipe, ranks, opened, index)
    if loader_state is not None:
        loader.load_state_dict(loader_state)
    files = [] if opened.streams else [(index, train_files)]
    evals: dict[str, EvalPass] = {}
    for name, sources in opened.evals.items():
        indexed = [(file, index_files([file])) for file in sources]
        files += [(eval_index, [file]) for file, eval_index in indexed]
        evals[name] = partial(_packs, recipe, ranks, opened.collate, indexed)
    rejects = RejectLedger(run_dir(recipe) / REJECTED_FILE, data.max_rejected_fraction, writes=ranks.is_main)
    for part, sources in files:
        names = [source.name for source in sources]
        rejects.add_index(names, num_rows=part.num_rows, num_usable=part.num_usable, rejects=part.rejects)
    first_rows: list[str] = []
    if isinstance(producer := loader.producer, StreamedWindows):
        first_rows = ranks.on_main(lambda: _describe_first_rows(producer.parts, recipe.train.seed))
    return TrainingData(loader, index, evals, files, rejects, first_rows)


def _describe_first_rows(parts: Sequence[Part], seed: int) -> list[str]:
    """Return lines about the first rows of each part: their formats, and why some cannot be used, by their text alone.

    Raises ValueError where they cannot be read.
    """
    formats: dict[str, Counter[str]] = {}
    num_rows: Counter[str] = Counter()
    rejects = RejectSummary()
    for part in parts:
        for row in islice(part.reader.rows(None, (seed,)), _PEEKED_ROWS):
            num_rows[row.file] += 1
            if isinstance(row.sample, RowFault):
                rejects.add([Reject.from_fault(row.file, row.row_number, row.sample)])
            else:
                formats.setdefault(dataset_of(row.sample.sample_id), Counter())[row.sample.row_format] += 1
    lines = [f"data: begins with {format_counts(*found)}" for found in formats.items()]
    if not rejects.num_rejects:
        return lines
    count = f"{rejects.num_rejects:,} of the first {num_rows.total():,} rows of the streams cannot be used"
    return [*lines, f"data: {count}", *(f"  - {line}" for line in rejects.lines(num_rows))]


@dataclass(frozen=True)
class _Opened:
    """What this rank has opened."""

    collate: MultimodalCollator
    rows: OpenedRows

    @property
    def train(self) -> list[tuple[FileSource | StreamSource, TrainSource]]:
        return self.rows.train

    @property
    def evals(self) -> dict[str, list[FileSource]]:
        return self.rows.evals

    @property
    def streams(self) -> bool:
        return any(entry.streaming for _, entry in self.train)

    def contents(self) -> DataContents:
        """Return name and content of everything that must be equal on every rank, as JSON."""
        sources = [source for source, _ in self.train] + [file for files in self.evals.values() for file in files]
        return [("the template, the tokenizer or a budget", self.collate.fingerprint())] + [
            (source.name, _content(source)) for source in sources
        ]


def _content(source: FileSource | StreamSource) -> dict[str, Any]:
    """Return what a source holds, without the times of files, which machines with copies of their own do not share."""
    rows = {"rows": len(source)} if isinstance(source, FileSource) else {}
    file = source.source if isinstance(source, SomeRows) else source
    if isinstance(file, HubSource):  # its fingerprint is made of a time
        return rows
    return {**rows, **{key: value for key, value in source.fingerprint().items() if key != "times"}}


def _make_loader(recipe: Recipe, ranks: Ranks, opened: _Opened, index: Index) -> Loader:
    """Return the loader. index: of all training rows, unless a source is a stream."""
    data, train, cost = recipe.data, recipe.train, cost_model(recipe)
    if opened.streams:
        parts = [
            Part(
                Numbered(source, data.shuffle) if isinstance(source, FileSource) else InOrder(source, entry.num_rows),
                entry.weight,
            )
            for source, entry in opened.train
        ]
        producer: WindowProducer = StreamedWindows(
            parts, opened.collate, length_rule(data), seed=train.seed, size=data.stream_window, cost_model=cost,
            broadcast=StoreBroadcast(ranks) if ranks.world_size > 1 else None,
            is_scanner=ranks.is_main, in_worker=data.num_workers > 0,
        )  # fmt: skip
    else:
        weighted = [(source, entry.weight) for source, entry in opened.train if isinstance(source, FileSource)]
        producer = IndexedWindows(weighted, index, seed=train.seed, shuffle=data.shuffle, cost_model=cost)
    return Loader(
        producer, opened.collate,
        packs_per_step=train.packs_per_step, limits=pack_limits(data),
        num_epochs=train.num_epochs if train.num_steps is None else None, num_steps=train.num_steps,
        shuffle=data.shuffle, data_rank=ranks.rank, data_world_size=ranks.world_size,
        num_workers=data.num_workers, pin_memory=ranks.device.type == "cuda",
        # Where it is made of the times of files, machines with copies of their own do not share it.
        fingerprint=ranks.on_main(producer.fingerprint),
    )  # fmt: skip


def _packs(
    recipe: Recipe,
    ranks: Ranks,
    collate: MultimodalCollator,
    files: Sequence[tuple[FileSource, Index]],
    rejected: list[Reject],
) -> Iterator[PackedBatch]:
    for file, index in files:
        for result in eval_packs(
            file, collate, index, limits=pack_limits(recipe.data), num_workers=recipe.data.num_workers,
            data_rank=ranks.rank, data_world_size=ranks.world_size,
        ):  # fmt: skip
            rejected += result.rejected
            if result.pack is not None:
                yield result.pack
