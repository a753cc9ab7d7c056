"""Steps of packs for one rank: a plan is dealt to ranks, and worker processes build what is dealt to this one.

What makes which pack and step depends on the data, the seed and the budgets, never on ranks, workers or timing. So a
position is a few numbers, and a run goes on exactly where it was, also on another number of ranks.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject, RowFault
from qwen3vl_train.data.formats import Sample
from qwen3vl_train.data.index import Index
from qwen3vl_train.data.plan import CostModel, PackLimits, arrange, plan_packs, random_stream, share
from qwen3vl_train.data.shipping import Shipment
from qwen3vl_train.data.sources import Source
from qwen3vl_train.data.stamps import local_files, stamp_of
from qwen3vl_train.data.workers import in_workers

WINDOW = 8192
"""Rows of an index that are planned together: enough that almost no pack has room left over."""


class PackResult(NamedTuple):
    """What becomes of one planned pack; pack is None when every row of it turned out broken."""

    pack: PackedBatch | None
    rejected: list[Reject]


Build = Callable[[Any], PackResult]
"""Makes a pack of what the plan says of it. Sent to worker processes."""


def build_packs(
    build: Build, planned: Iterable[Any], num_workers: int, *, pin_memory: bool = False
) -> Iterator[PackResult]:
    """Yield what `build` makes of each planned pack, in order, see `in_workers`; packs come through shared memory."""
    if not num_workers:
        for result in map(build, planned):
            yield result._replace(pack=result.pack.pin_memory()) if pin_memory and result.pack else result
        return
    for shipped, rejected in in_workers(_Ship(build), planned, num_workers, pin_memory=pin_memory):
        yield PackResult(shipped.unpack() if shipped else None, rejected)


class _Ship:
    def __init__(self, build: Build) -> None:
        self.build = build

    def __call__(self, planned: Any) -> tuple[Shipment | None, list[Reject]]:
        pack, rejected = self.build(planned)
        return Shipment.of(pack) if pack else None, rejected


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step that this rank trains on.

    packs may be empty: a short last step has fewer packs than ranks, or all rows of a pack were broken.
    pack_numbers: place of each pack among the packs of the step over all ranks. num_packs: planned packs of the step
    over all ranks. epoch: counted from 0. rejected: rows of this rank that broke when decoded, and, on rank 0, rows of
    a stream that cannot be used. state: where the loader stands AFTER this step, as JSON, the same on every rank; save
    it with what the step has trained. num_shrunk: media in the step, over all ranks, that a budget made smaller.
    num_seen, num_dropped: rows looked at since the run began, and those of them left out by `too_long: drop`.

    Which source a sample is of is in its name: `rows.source_of(name)` for each of `PackedBatch.sample_ids`.
    """

    packs: list[PackedBatch]
    pack_numbers: list[int]
    num_packs: int
    epoch: int
    rejected: list[Reject]
    state: dict[str, Any]
    num_shrunk: int = 0
    num_seen: int = 0
    num_dropped: int = 0


@dataclass
class PlannedStep:
    """One step of all ranks. packs: what `build` is given for each; work: of each, by which they are dealt to ranks.

    See StepPacks for the other fields.
    """

    packs: list[Any]
    work: list[int]
    epoch: int
    state: dict[str, Any]
    num_shrunk: int
    num_seen: int
    num_dropped: int
    rejected: list[Reject] = field(default_factory=list)


def deal_steps(
    steps: Iterator[PlannedStep],
    build: Build,
    *,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[StepPacks]:
    """Yield the steps with this rank's packs built, a few packs ahead of time in worker processes.

    The plan is walked once, by whatever asks for the next pack to build; a step without a pack of this rank takes its
    turn there too, as a pack to build of nothing.
    """
    planned: deque[tuple[PlannedStep, list[int]]] = deque()

    def to_build() -> Iterator[Any]:
        for step in steps:
            mine = share(step.work, world_size)[rank]
            packs, step.packs = step.packs, []
            planned.append((step, mine))
            yield from [packs[number] for number in mine] or [()]

    results = build_packs(build, to_build(), num_workers, pin_memory=pin_memory)
    for result in results:
        step, mine = planned.popleft()
        of_step = [result, *(next(results) for _ in mine[1:])] if mine else []
        built = [(number, pack) for number, (pack, _) in zip(mine, of_step, strict=True) if pack is not None]
        yield StepPacks(
            packs=[pack for _, pack in built],
            pack_numbers=[number for number, _ in built],
            num_packs=len(step.work),
            epoch=step.epoch,
            rejected=[reject for _, rejected in of_step for reject in rejected] + (step.rejected if rank == 0 else []),
            state=step.state,
            num_shrunk=step.num_shrunk,
            num_seen=step.num_seen,
            num_dropped=step.num_dropped,
        )


class BuildRows:
    """Builds packs from row numbers of an index, in a worker process or in this one."""

    def __init__(self, sources: Sequence[Source], collator: MultimodalCollator, index: Index) -> None:
        self.sources, self.collator, self.index = sources, collator, index

    def __call__(self, rows: Sequence[int]) -> PackResult:
        encoded, rejected = [], []
        for number in rows:
            place, row = self.index.locate(number)
            source = self.sources[place]
            try:
                sample = source.sample(row)
                self._check_unchanged(sample, number)
                made = self.collator.encode(sample)
                if made.input_ids.numel() != self.index.tokens[number]:
                    raise RowFault(
                        f"sample has {made.input_ids.numel()} tokens but had {self.index.tokens[number]} when it was "
                        "indexed; its row or its media changed since, start again"
                    )
            except RowFault as fault:
                rejected.append(Reject(source.name, source.row_number(row), str(fault)))
            else:
                encoded.append(made)
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)

    def _check_unchanged(self, sample: Sample, number: int) -> None:
        if stamp_of(sample) != self.index.stamps[number]:
            raise RowFault(changed_media(sample, "indexed"))


def changed_media(sample: Sample, when: str) -> str:
    """Say that a media file of a sample is not as it was."""
    paths = local_files(sample)
    named = ", ".join(paths[:3]) + (f" or {len(paths) - 3} more" if len(paths) > 3 else "")
    return (
        f"size or time of {named} is not what it was when the row was {when}; the row is left out, start again to take "
        "it as it is now"
    )


def check_run(packs_per_step: int, num_epochs: int | None, num_steps: int | None) -> None:
    """Raise ValueError for a length of the run or of a step that is none."""
    if packs_per_step < 1:
        raise ValueError(f"train.packs_per_step: got {packs_per_step}; use at least 1")
    if (num_epochs is None) == (num_steps is None):
        raise ValueError(f"train: num_epochs is {num_epochs} and num_steps is {num_steps}; give one of them")
    if (num_epochs or num_steps or 0) < 1:
        raise ValueError(f"train: num_epochs is {num_epochs} and num_steps is {num_steps}; use at least 1")


def check_weights(sources_with_weights: Sequence[tuple[Any, float]]) -> None:
    for source, weight in sources_with_weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"data.train: {source.name}: weight is {weight}; use a number above 0")


def check_fingerprint(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError that names what of the data or the plan is not as it was when a state was saved."""
    changed = [key for key, value in ours.items() if theirs.get(key) != value]
    if changed:
        what = {"sources": "the data files", "costs": "the rows' token counts", "encoder": "the template or a budget"}
        names = ", ".join(what.get(key, f"{key} ({theirs.get(key)} then, {ours[key]} now)") for key in changed)
        raise ValueError(
            f"resume: {names} changed since the checkpoint, so the run cannot go on exactly; put them back or start a "
            "new run"
        )


class _Position(NamedTuple):
    """Where the loader stands: the next step is step_in_epoch (from 0) of epoch, or the first of the one behind it."""

    epoch: int
    step_in_epoch: int
    steps_done: int


class TrainLoader:
    """Yields the steps of a training run for one rank, from the beginning or from a loaded state."""

    def __init__(
        self,
        sources_with_weights: Sequence[tuple[Source, float]],
        collator: MultimodalCollator,
        index: Index,
        *,
        packs_per_step: int,
        limits: PackLimits,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_epochs: int | None = None,
        num_steps: int | None = None,
        window: int = WINDOW,
        cost_model: CostModel | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prepare; nothing is read until iteration.

        sources_with_weights: weight 1 is every row once an epoch, 2 twice, 0.5 another random half each epoch.
        Exactly one of num_epochs and num_steps ends the run. packs_per_step counts the packs of all ranks. Raises
        ValueError for settings out of range and for data that holds no step.
        """
        self.sources = [source for source, _ in sources_with_weights]
        self.weights = [float(weight) for _, weight in sources_with_weights]
        lengths = [len(source) for source in self.sources]
        assert np.diff(index.starts).tolist() == lengths, f"index of other sources: {index.starts}, rows {lengths}"
        check_weights(sources_with_weights)
        check_run(packs_per_step, num_epochs, num_steps)
        if not index.num_usable:
            raise ValueError("data.train: no usable row; mend the rows that rejected.jsonl lists")
        self.index, self.collator, self.limits, self.window = index, collator, limits, window
        self.packs_per_step, self.seed = packs_per_step, seed
        self.rank, self.world_size, self.num_workers, self.pin_memory = rank, world_size, num_workers, pin_memory
        self.num_epochs, self._num_steps = num_epochs, num_steps
        self.cost_model = cost_model or CostModel()
        self.work = self.cost_model.work(index.tokens, index.patches, index.patch_pairs)
        self._position = _Position(0, 0, 0)
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        self._fingerprint = {
            "sources": [source.fingerprint() for source in self.sources],
            "weights": self.weights,
            "costs": index.digest(),
            "seed": seed,
            "limits": repr(limits),
            "packs_per_step": packs_per_step,
            "window": window,
            "cost_model": repr(self.cost_model),
        }

    @property
    def max_tokens(self) -> int:
        return self.limits.tokens

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, from its beginning. With num_epochs, plans every epoch once."""
        if self._num_steps is None:
            assert self.num_epochs is not None
            self._num_steps = sum(self._steps_of(epoch) for epoch in range(self.num_epochs))
        return self._num_steps

    def _steps_of(self, epoch: int) -> int:
        return math.ceil(len(self.epoch_packs(epoch)) / self.packs_per_step)

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """Return the planned packs of an epoch as lists of row numbers, all ranks and steps in order."""
        if self._planned[0] != epoch:
            order = self._epoch_order(epoch)
            packs: list[list[int]] = []
            for number, start in enumerate(range(0, len(order), self.window)):
                rows = order[start : start + self.window]
                tokens, patches, work = self.index.tokens[rows], self.index.patches[rows], self.work[rows]
                found = plan_packs(tokens, patches, work, self.limits)
                places = arrange(
                    [int(work[pack].sum()) for pack in found],
                    packs_per_step=self.packs_per_step,
                    lead=-len(packs) % self.packs_per_step,
                    seed=(self.seed, epoch, 1, number),
                )
                packs += [rows[found[place]].tolist() for place in places]
            self._planned = (epoch, packs)
        return self._planned[1]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, shuffled: each usable row as often as its source's weight says."""
        stream = random_stream((self.seed, epoch, 0))
        chosen = []
        for source, weight in enumerate(self.weights):
            rows = self.index.usable(source)
            whole, fraction = int(weight), weight - int(weight)
            some = stream.permutation(len(rows))[: max(round(fraction * len(rows)), 1 if weight < 1 else 0)]
            chosen += [rows] * whole + [rows[np.sort(some)]]
        order = np.concatenate(chosen)
        return order[stream.permutation(len(order))]

    def state(self) -> dict[str, Any]:
        """Return the position of the next step to be yielded, as JSON."""
        return {**self._position._asdict(), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step whose `StepPacks.state` this is; call it before iterating.

        Rank and world size may differ from those of the run that saved it. Raises ValueError that names what of the
        data or the plan is not as it was.
        """
        check_fingerprint(state["fingerprint"], self._fingerprint)
        self._position = _Position(state["epoch"], state["step_in_epoch"], state["steps_done"])

    def _steps(self, start: _Position) -> Iterator[PlannedStep]:
        """Yield the steps from a position to the end of the run."""
        epoch, step, done = start
        while done < self.num_steps:
            packs = self.epoch_packs(epoch)
            while step * self.packs_per_step < len(packs) and done < self.num_steps:
                of_step = packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]
                step, done = step + 1, done + 1
                yield PlannedStep(
                    of_step,
                    [int(self.work[pack].sum()) for pack in of_step],
                    epoch,
                    {**_Position(epoch, step, done)._asdict(), "fingerprint": self._fingerprint},
                    num_shrunk=sum(int(self.index.num_shrunk[pack].sum()) for pack in of_step),
                    num_seen=self.index.num_rows,
                    num_dropped=self.index.num_dropped,
                )
            epoch, step = epoch + 1, 0

    def __iter__(self) -> Iterator[StepPacks]:
        """Yield the steps from the position on; the position moves as steps are yielded."""
        steps = deal_steps(
            self._steps(self._position),
            BuildRows(self.sources, self.collator, self.index),
            rank=self.rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for step in steps:
            self._position = _Position(step.state["epoch"], step.state["step_in_epoch"], step.state["steps_done"])
            yield step


def eval_packs(
    source: Source,
    collator: MultimodalCollator,
    index: Index,
    *,
    limits: PackLimits,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[PackResult]:
    """Yield the packs of an evaluation file in its order, every usable row once; rank r takes packs r, r + world, ...

    index: of this source alone. Ranks may get different numbers of packs.
    """
    sizes, capacities = limits.sizes(index.tokens, index.patches)
    packs: list[list[int]] = []
    room = np.zeros_like(capacities)
    for number in index.usable(0).tolist():
        if not packs or (sizes[number] > room).any():
            packs.append([])
            room = capacities.copy()
        packs[-1].append(number)
        room -= sizes[number]
    yield from build_packs(BuildRows([source], collator, index), packs[rank::world_size], num_workers)
