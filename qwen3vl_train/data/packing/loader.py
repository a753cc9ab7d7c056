"""The loader of data that is indexed: plans epochs from costs, and evaluation files.

What makes which pack and step depends on the data, the seed and the budgets, never on ranks, workers or timing. So a
position is a few numbers, and a run goes on exactly where it was, also on another number of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.packing.index import Index
from qwen3vl_train.data.packing.plan import CostModel, PackLimits, arrange, plan_packs, random_stream
from qwen3vl_train.data.packing.steps import PackResult, PlanMark, PlannedStep, StepPacks, build_packs, deal_steps
from qwen3vl_train.data.rows.media_files import local_files, stamp_of
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import Source

WINDOW = 8192
"""Rows of an index that are planned together: enough that almost no pack has room left over."""


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
                        "indexed; its row or its media changed since, start again",
                        kind="changed",
                    )
            except RowFault as fault:
                rejected.append(Reject.from_fault(source.name, source.row_number(row), fault))
            else:
                encoded.append(made)
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)

    def _check_unchanged(self, sample: Sample, number: int) -> None:
        if stamp_of(sample) != self.index.stamps[number]:
            raise RowFault(changed_media(sample, "indexed"), kind="changed")


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
        Exactly one of num_epochs and num_steps ends the run. packs_per_step counts the packs of all ranks. An index
        without a usable row makes a run of no steps. Raises ValueError for settings out of range.
        """
        self.sources = [source for source, _ in sources_with_weights]
        self.weights = [float(weight) for _, weight in sources_with_weights]
        lengths = [len(source) for source in self.sources]
        assert np.diff(index.starts).tolist() == lengths, f"index of other sources: {index.starts}, rows {lengths}"
        check_weights(sources_with_weights)
        check_run(packs_per_step, num_epochs, num_steps)
        self.index, self.collator, self.limits, self.window = index, collator, limits, window
        self.packs_per_step, self.seed = packs_per_step, seed
        self.rank, self.world_size, self.num_workers, self.pin_memory = rank, world_size, num_workers, pin_memory
        self.num_epochs, self._num_steps = num_epochs, num_steps if index.num_usable else 0
        self.cost_model = cost_model or CostModel()
        self.work = self.cost_model.work(index.tokens, index.patches, index.patch_pairs)
        self._position = _Position(0, 0, 0)
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        self._epoch_lengths: dict[int, int] = {}  # in steps
        self.fingerprint: dict[str, Any] = {
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
    def epoch(self) -> int:
        """The epoch of the last step yielded, counted from 0."""
        return self._position.epoch

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, from its beginning. With num_epochs, plans every epoch whose length is not known."""
        if self._num_steps is None:
            self._num_steps = sum(self._lengths())
        return self._num_steps

    def _lengths(self) -> list[int]:
        """Return the steps of each epoch; of none where num_steps ends the run, which need not be known ahead."""
        epochs = range(self.num_epochs or 0)
        # The epoch that is trained next comes last: the plan of the last one is kept.
        for epoch in sorted(set(epochs) - self._epoch_lengths.keys(), key=lambda epoch: (epoch == self.epoch, epoch)):
            self._epoch_lengths[epoch] = math.ceil(len(self.epoch_packs(epoch)) / self.packs_per_step)
        return [self._epoch_lengths[epoch] for epoch in epochs]

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """Return the packs of an epoch as lists of row numbers, all ranks and steps in order; keeps the last."""
        if self._planned[0] != epoch:
            self._planned = (epoch, list(self._plan(epoch)))
        return self._planned[1]

    def _plan(self, epoch: int) -> Iterator[list[int]]:
        """Yield the packs of an epoch, planned window by window as they are asked for."""
        order = self._epoch_order(epoch)
        done = 0
        for number, start in enumerate(range(0, len(order), self.window)):
            rows = order[start : start + self.window]
            tokens, patches, work = self.index.tokens[rows], self.index.patches[rows], self.work[rows]
            found = plan_packs(tokens, patches, work, self.limits)
            places = arrange(
                [int(work[pack].sum()) for pack in found],
                packs_per_step=self.packs_per_step,
                lead=-done % self.packs_per_step,
                seed=(self.seed, epoch, 1, number),
            )
            yield from (rows[found[place]].tolist() for place in places)
            done += len(places)

    def _steps_of(self, epoch: int) -> Iterator[list[list[int]]]:
        """Yield the packs of each step of an epoch, from the plan that is kept if it is this epoch's."""
        packs = iter(self._planned[1]) if self._planned[0] == epoch else self._plan(epoch)
        while step := list(islice(packs, self.packs_per_step)):
            yield step

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
        return self._state(self._position)

    def _state(self, position: _Position) -> dict[str, Any]:
        # With the lengths of the epochs, so that a run that goes on need not plan all of them again.
        return {**position._asdict(), "epoch_lengths": self._lengths(), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step whose `StepPacks.state` this is; call it before iterating.

        Rank and world size may differ from those of the run that saved it. Raises ValueError that names what of the
        data or the plan is not as it was.
        """
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self._epoch_lengths.update(enumerate(state["epoch_lengths"]))
        self._stand_at(state)

    def _stand_at(self, state: dict[str, Any]) -> None:
        self._position = _Position(state["epoch"], state["step_in_epoch"], state["steps_done"])

    def _steps(self, start: _Position) -> Iterator[PlannedStep]:
        """Yield the steps from a position to the end of the run."""
        epoch, step, done = start
        while done < self.num_steps:
            for of_step in islice(self._steps_of(epoch), step, step + self.num_steps - done):
                step, done = step + 1, done + 1
                position = _Position(epoch, step, done)
                yield PlannedStep(
                    of_step,
                    [int(self.work[pack].sum()) for pack in of_step],
                    epoch,
                    self._state(position),
                    PlanMark.from_plan(position._asdict(), of_step),
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
            self._stand_at(step.state)
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
