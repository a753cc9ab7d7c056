"""The training loader of sources that come row after row and need not say how many rows they have.

A window of rows is read, looked at and packed, then the next. Memory holds a few windows, however long the stream. A
position is where its window begins and how many packs of it are used up: going on reads that window again. Every rank
looks at all rows (text and headers only) and plans alike, so that nothing depends on the number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.encode import EncodedSample, SampleCost
from qwen3vl_train.data.faults import Reject, RowFault
from qwen3vl_train.data.formats import Sample, TextPart
from qwen3vl_train.data.index import LengthRule
from qwen3vl_train.data.loader import (
    PackResult,
    PlannedStep,
    StepPacks,
    changed_media,
    check_fingerprint,
    check_run,
    check_weights,
    deal_steps,
)
from qwen3vl_train.data.mixture import Cursor, Mixture, Part
from qwen3vl_train.data.plan import CostModel, PackLimits, arrange, plan_packs
from qwen3vl_train.data.stamps import stamp_of
from qwen3vl_train.data.workers import from_worker

_MAX_BYTES = 512 << 20
"""Of media inside the rows of one window, which are held in memory; the window ends early."""


class StreamedRow(NamedTuple):
    """A row as it was when it was looked at. file, number: for people. tokens, stamp: see `_BuildSamples`."""

    sample: Sample
    file: str
    number: int
    tokens: int
    stamp: int


@dataclass
class Window:
    """Neighbouring rows of the stream. costs: int64 (fields of SampleCost, usable rows).

    behind: cursor of the first row behind it, in the next epoch where ends_epoch. num_rows: of them all.
    """

    epoch: int
    rows: list[StreamedRow] = field(default_factory=list)
    costs: list[SampleCost] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_rows: int = 0
    num_dropped: int = 0
    behind: Cursor = field(default_factory=dict)
    ends_epoch: bool = False


class Scanner:
    """Reads windows from a cursor on, for ever."""

    def __init__(self, mixture: Mixture, collator: MultimodalCollator, rule: LengthRule, window: int) -> None:
        self.mixture, self.collator, self.rule, self.window = mixture, collator, rule, window

    def windows(self, cursor: Cursor) -> Iterator[Window]:
        """Yield windows; they end with their epoch. Raises ValueError when an epoch holds no usable row."""
        num_usable, whole_epoch = 0, cursor == self.mixture.start(cursor["epoch"])
        seen: list[Reject] = []
        num_rows = 0
        while True:
            window = self._read(cursor)
            num_usable += len(window.rows)
            num_rows += window.num_rows
            seen = (seen + window.rejects)[:3]
            if window.ends_epoch:
                if whole_epoch and not num_usable:
                    names = ", ".join(part.name for part in self.mixture.parts)
                    shown = "".join(f"\n  - {reject}" for reject in seen)
                    raise ValueError(
                        f"{names}: nothing to learn from, none of {num_rows} rows can be used; mend the rows{shown}"
                    )
                num_usable, num_rows, whole_epoch = 0, 0, True
            yield window
            cursor = window.behind

    def _read(self, cursor: Cursor) -> Window:
        window = Window(cursor["epoch"], behind=cursor)
        num_bytes = 0
        for behind, row in self.mixture.rows(cursor):
            window.behind = behind
            window.num_rows += 1
            try:
                if isinstance(row.sample, RowFault):
                    raise row.sample
                cost = self.rule.admit(row.sample, self.collator)
            except RowFault as fault:
                window.rejects.append(Reject(row.file, row.row_number, str(fault)))
            else:
                if cost is None:
                    window.num_dropped += 1
                else:
                    stamp = stamp_of(row.sample)
                    window.rows.append(StreamedRow(row.sample, row.file, row.row_number, cost.tokens, stamp))
                    window.costs.append(cost)
                    num_bytes += _inline_bytes(row.sample)
            if window.num_rows == self.window or num_bytes > _MAX_BYTES:
                return window
        window.behind, window.ends_epoch = self.mixture.start(cursor["epoch"] + 1), True
        return window


def _inline_bytes(sample: Sample) -> int:
    """Return how much memory the media take that lie inside a row."""
    parts = [part for message in sample.messages for part in message.content if not isinstance(part, TextPart)]
    return sum(_size(getattr(part, "image", None) or getattr(part, "video", None)) for part in parts)


def _size(medium: Any) -> int:
    if isinstance(medium, bytes | str):
        return len(medium)
    if isinstance(medium, list | tuple):
        return sum(_size(item) for item in medium)
    return 3 * medium.width * medium.height if hasattr(medium, "width") else 0


class _BuildSamples:
    """Builds packs from samples, in a worker process or in this one."""

    def __init__(self, collator: MultimodalCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[StreamedRow]) -> PackResult:
        encoded: list[EncodedSample] = []
        rejected: list[Reject] = []
        for row in rows:
            try:
                made = self.collator.encode(row.sample)
                if made.input_ids.numel() != row.tokens or stamp_of(row.sample) != row.stamp:
                    raise RowFault(changed_media(row.sample, "read"))
            except RowFault as fault:
                rejected.append(Reject(row.file, row.number, str(fault)))
            else:
                encoded.append(made)
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)


class _Position(NamedTuple):
    """The next step begins behind the first `taken` packs of the window at `cursor`.

    lead: packs of this window that complete the last step of the window before, see `arrange`. num_seen, num_dropped:
    rows before this window since the run began.
    """

    cursor: Cursor
    lead: int
    taken: int
    steps_done: int
    num_seen: int
    num_dropped: int


class StreamLoader:
    """Yields the steps of a training run for one rank, as `TrainLoader` does."""

    def __init__(
        self,
        parts: Sequence[Part],
        collator: MultimodalCollator,
        rule: LengthRule,
        *,
        packs_per_step: int,
        limits: PackLimits,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_epochs: int | None = None,
        num_steps: int | None = None,
        window: int = 2048,
        cost_model: CostModel | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prepare; nothing is read until iteration.

        window: rows that are planned together. Exactly one of num_epochs and num_steps ends the run. With workers, one
        more process reads the stream. Raises ValueError for settings out of range.
        """
        check_weights([(part, part.weight) for part in parts])
        check_run(packs_per_step, num_epochs, num_steps)
        self.parts, self.collator, self.limits, self.packs_per_step, self.seed = (
            parts, collator, limits, packs_per_step, seed
        )  # fmt: skip
        self.rank, self.world_size, self.num_workers, self.pin_memory = rank, world_size, num_workers, pin_memory
        self.num_epochs = num_epochs
        self.num_steps = num_steps
        """Steps of the whole run, from its beginning; None where num_epochs ends it: a stream does not say."""
        self.window = window
        self.cost_model = cost_model or CostModel()
        mixture = Mixture(parts, seed)
        self._scanner = Scanner(mixture, collator, rule, window)
        self._position = _Position(mixture.start(), 0, 0, 0, 0, 0)
        self.num_seen = 0
        """Rows looked at for the steps yielded so far, since the run began."""
        self._fingerprint = {
            "sources": [part.reader.source.fingerprint() for part in parts],
            "weights": [part.weight for part in parts],
            "encoder": [collator.fingerprint(), list(rule)],
            "seed": seed,
            "limits": repr(limits),
            "packs_per_step": packs_per_step,
            "window": window,
            "cost_model": repr(self.cost_model),
        }

    @property
    def max_tokens(self) -> int:
        return self.limits.tokens

    def state(self) -> dict[str, Any]:
        """Return the position of the next step to be yielded, as JSON."""
        return self._state(self._position, self.num_seen)

    def _state(self, position: _Position, seen: int) -> dict[str, Any]:
        return {**position._asdict(), "seen": seen, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step whose `StepPacks.state` this is; call it before iterating.

        Rank and world size may differ from those of the run that saved it. Raises ValueError that names what of the
        data or the plan is not as it was.
        """
        check_fingerprint(state["fingerprint"], self._fingerprint)
        self._stand_at(state)

    def _stand_at(self, state: dict[str, Any]) -> None:
        self._position = _Position(*(state[name] for name in _Position._fields))
        self.num_seen = state["seen"]

    def __iter__(self) -> Iterator[StepPacks]:
        """Yield the steps from the position on; the position moves as steps are yielded."""
        steps = deal_steps(
            self._steps(self._position),
            _BuildSamples(self.collator),
            rank=self.rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for step in steps:
            self._stand_at(step.state)
            yield step

    def _steps(self, position: _Position) -> Iterator[PlannedStep]:
        """Yield the steps from a position to the end of the run, reading windows as they are needed."""
        begun: list[_PlannedPack] = []
        rejected: list[Reject] = []
        if self._ends(position):
            return
        for window in from_worker(self._scanner.windows, position.cursor, in_process=self.num_workers == 0):
            packs = self._plan(window, position)
            # A position inside the window is behind a step that has told of the window's rejects.
            rejected += window.rejects if not position.taken else []
            seen = (position.num_seen + window.num_rows, position.num_dropped + window.num_dropped)
            for place in range(position.taken, len(packs)):
                begun.append(packs[place])
                if len(begun) == self.packs_per_step:
                    position = position._replace(taken=place + 1, steps_done=position.steps_done + 1)
                    yield self._step(begun, window.epoch, position, seen, rejected)
                    begun, rejected = [], []
                    if self._ends(position):
                        return
            short = window.ends_epoch and bool(begun)
            position = _Position(
                window.behind, 0 if short else -len(begun) % self.packs_per_step, 0, position.steps_done + short, *seen
            )
            if short:
                yield self._step(begun, window.epoch, position, seen, rejected)
                begun, rejected = [], []
            if self._ends(position):
                return

    def _ends(self, position: _Position) -> bool:
        if self.num_steps is not None:
            return position.steps_done >= self.num_steps
        assert self.num_epochs is not None
        return position.cursor["epoch"] >= self.num_epochs

    def _plan(self, window: Window, position: _Position) -> list["_PlannedPack"]:
        """Pack a window. The order of its packs follows from the window and `lead` alone."""
        if not window.rows:
            return []
        costs = np.array(window.costs, dtype=np.int64).T
        tokens, _, patches, patch_pairs, num_shrunk = costs
        work = self.cost_model.work(tokens, patches, patch_pairs)
        found = plan_packs(tokens, patches, work, self.limits)
        # Drawn from where the window begins, so that every window has an order of its own.
        drawn = sum(part["drawn"] for part in position.cursor["parts"])
        places = arrange(
            [int(work[pack].sum()) for pack in found],
            packs_per_step=self.packs_per_step,
            lead=position.lead,
            seed=(self.seed, window.epoch, 1, drawn),
        )
        return [
            _PlannedPack([window.rows[row] for row in found[place]], int(work[found[place]].sum()),
                         int(num_shrunk[found[place]].sum()))
            for place in places
        ]  # fmt: skip

    def _step(
        self,
        packs: list["_PlannedPack"],
        epoch: int,
        position: _Position,
        seen: tuple[int, int],
        rejected: list[Reject],
    ) -> PlannedStep:
        return PlannedStep(
            packs=[pack.rows for pack in packs],
            work=[pack.work for pack in packs],
            epoch=epoch,
            state=self._state(position, seen[0]),
            num_shrunk=sum(pack.num_shrunk for pack in packs),
            num_seen=seen[0],
            num_dropped=seen[1],
            rejected=rejected,
        )


class _PlannedPack(NamedTuple):
    rows: list[StreamedRow]
    work: int
    num_shrunk: int
