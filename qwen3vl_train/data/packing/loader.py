"""The training loader: plans windows of rows into packs and steps, and builds this rank's share of each step.

What makes which pack and step depends on the data, the seed and the budgets, never on ranks, workers or timing. So a
position is a few numbers, and a run resumes exactly, also on another number of ranks. Memory holds a few windows,
however long the data is.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.packs import Families, PackBuilder, PackResult, build_packs
from qwen3vl_train.data.packing.plan import (
    PackLimits,
    PlanHash,
    arrange,
    pack_in_order,
    plan_packs,
    rank_loads,
    share,
)
from qwen3vl_train.data.packing.windows import Cursor, Window, WindowProducer


class PlannedPack(NamedTuple):
    """The families of one pack, with their total cost."""

    families: Families
    tokens: int
    work: int
    num_shrunk: int

    @property
    def rows(self) -> list[Any]:
        return list(chain.from_iterable(self.families))


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step that this rank trains on.

    packs: may be empty: a short last step has fewer packs than ranks, or all rows of a pack were broken.
    rejected: rows of this rank that broke when they were decoded and, on rank 0, rows of a stream that cannot be used.
    state: the loader's position AFTER this step, as JSON, the same on every rank; save it with what the step trained.

    Which source a sample is of is in its name: `rows.parse.dataset_of(name)` for each of `PackedBatch.sample_ids`.
    """

    packs: list[PackedBatch]
    pack_numbers: list[int]  # index of each pack among the packs of the step over all ranks
    num_packs: int  # planned, over all ranks
    epoch: int  # counted from 0
    rejected: list[Reject]
    state: dict[str, Any]
    balance: float  # planned work of the busiest rank, over the mean of all ranks
    plan_hash: PlanHash  # the same on every rank, or they have not planned the same
    ends_epoch: bool  # no step of this epoch follows; of a stream, false where only rows that cannot be used follow
    num_shrunk: int  # media in the step, over all ranks, that a budget made smaller
    num_seen: int  # rows scanned since the run began
    num_dropped: int  # of them, as too long
    window_patches: int = 0  # of all rows of the window that the step ends in


class Position(NamedTuple):
    """The next step begins after the first `taken` packs of the window at `cursor`.

    carry_over: packs of this window that complete the last step of the window before, see `arrange`.
    num_seen, num_dropped: rows scanned and dropped since the run began, with those of this window once taken > 0.
    skipped, content_hash: those of this window, once taken > 0 (see `Window`): read again, it must give the same plan,
        whatever can be read by then.
    """

    cursor: Cursor
    carry_over: int
    taken: int
    steps_done: int
    num_seen: int
    num_dropped: int
    skipped: list[int]
    content_hash: int


class Loader:
    """Yields the steps of a training run for one rank, from the beginning or from a loaded state."""

    def __init__(
        self,
        producer: WindowProducer,
        collator: MultimodalCollator,
        *,
        packs_per_step: int,
        limits: PackLimits,
        num_epochs: float | None = None,
        num_steps: int | None = None,
        shuffle: bool = True,
        data_rank: int = 0,
        data_world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        """Prepare; nothing is read until iteration. Raises ValueError for settings out of range.

        packs_per_step: of all ranks together.
        num_epochs, num_steps: exactly one of them ends the run; one without a usable row has no steps. Of the last
            epoch, a fraction is trained to the nearest step; that needs rows that are counted.
        shuffle: whether packs and their steps are chosen for even work; else rows are packed in their order.
        data_rank, data_world_size: which share of the packs is this rank's; ranks that share a pack have the same.
        fingerprint: of the producer, where not this rank's own.
        """
        if packs_per_step < 1:
            raise ValueError(f"train.packs_per_step: got {packs_per_step}; use at least 1")
        ends = f"train: num_epochs is {num_epochs} and num_steps is {num_steps}"
        if (num_epochs is None) == (num_steps is None):
            raise ValueError(f"{ends}; give one of them")
        if (num_epochs or 0) <= 0 and (num_steps or 0) < 1:
            raise ValueError(f"{ends}; use more than 0")
        if (num_epochs or 0) % 1 and producer.num_usable is None:
            raise ValueError(f"{ends}; a stream does not say how long an epoch is, use train.num_steps")
        self.producer, self.collator, self.limits, self.packs_per_step = producer, collator, limits, packs_per_step
        self.num_epochs, self._num_steps = num_epochs, 0 if producer.num_usable == 0 else num_steps
        self.shuffle = shuffle
        self.data_rank, self.data_world_size = data_rank, data_world_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.fingerprint: dict[str, Any] = {
            **(producer.fingerprint() if fingerprint is None else fingerprint),
            "limits": repr(limits),
            "packs_per_step": packs_per_step,
            **({} if shuffle else {"shuffle": False}),
        }
        self._position = Position(producer.start(), 0, 0, 0, *producer.counts, [], 0)
        self._epoch_lengths: dict[int, int] = {}  # in steps
        self._kept: tuple[int, dict[tuple[int, ...], list[PlannedPack]]] = (-1, {})

    @property
    def epoch(self) -> int:
        """Of the position, counted from 0."""
        return self._position.cursor["epoch"]

    @property
    def num_seen(self) -> int:
        """Rows scanned for the steps yielded so far, since the run began."""
        return self._position.num_seen

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, from its beginning; None where num_epochs ends it and a stream does not say.

        With num_epochs, every epoch is planned whose length is not known yet.
        """
        if self._num_steps is None and self.producer.num_usable is not None:
            lengths = self._plan_lengths()
            fraction = (self.num_epochs or 0) % 1
            last = max(1, round(fraction * lengths.pop())) if fraction else 0
            self._num_steps = sum(lengths) + last
        return self._num_steps

    def _plan_lengths(self) -> list[int]:
        """Return the steps of each epoch begun; of none where they need not or cannot be known ahead."""
        epochs = range(math.ceil(self.num_epochs or 0)) if self.producer.num_usable is not None else range(0)
        # The epoch that is trained next comes last: the plan of the last one is kept.
        for epoch in sorted(set(epochs) - self._epoch_lengths.keys(), key=lambda epoch: (epoch == self.epoch, epoch)):
            self._epoch_lengths[epoch] = math.ceil(len(self.epoch_packs(epoch)) / self.packs_per_step)
        return [self._epoch_lengths[epoch] for epoch in epochs]

    def epoch_packs(self, epoch: int) -> list[PlannedPack]:
        """Return all packs of an epoch of indexed rows, over all ranks and steps in order. The last plan is kept."""
        if self._kept[0] != epoch:
            plans: dict[tuple[int, ...], list[PlannedPack]] = {}
            for window, packs, _ in self._planned(self.producer.start(epoch)):
                plans[window.order_seed] = packs
                if window.ends_epoch:
                    break
            self._kept = epoch, plans
        return list(chain.from_iterable(self._kept[1].values()))

    def state(self) -> dict[str, Any]:
        """Return the position of the next step to be yielded, as JSON."""
        return self._state(self._position)

    def _state(self, position: Position) -> dict[str, Any]:
        # With the lengths of the epochs, so that a resumed run need not plan all of them again.
        return {**position._asdict(), "epoch_lengths": self._plan_lengths(), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step whose `StepPacks.state` this is; call it before iterating.

        Rank and number of ranks may differ from those of the run that saved it. Raises ValueError that names what has
        changed in the data or the plan.
        """
        if missing := [name for name in Position._fields if name not in state]:
            raise ValueError(
                f"resume: the position in the data has no {', '.join(missing)}: the checkpoint is of an earlier "
                "version of qwen3vl_train; continue with that version, or start a new run"
            )
        saved, current = state["fingerprint"], self.fingerprint
        what = {"sources": "the data files", "costs": "the rows' token counts", "encoder": "the template or a budget"}
        if changed := [key for key, value in current.items() if saved.get(key) != value]:
            names = ", ".join(what.get(key, f"{key} ({saved.get(key)} then, {current[key]} now)") for key in changed)
            raise ValueError(
                f"resume: {names} changed since the checkpoint, so the run cannot continue exactly; put them back or "
                "start a new run"
            )
        self._epoch_lengths.update(enumerate(state["epoch_lengths"]))
        self._move_to(state)

    def _move_to(self, state: dict[str, Any]) -> None:
        self._position = Position(*(state[name] for name in Position._fields))

    def __iter__(self) -> Iterator[StepPacks]:
        """Yield the steps from the position on; the position moves as steps are yielded.

        The plan is walked once, by whatever asks for the next pack to build, and at the same pace on every rank: a rank
        with fewer packs in a step builds empty packs in their place. So ranks that replay the scan of rank 0 ask for
        a step only when rank 0 is about to do so, too.
        """
        planned: deque[StepPacks] = deque()

        def packs_to_build() -> Iterator[Families]:
            for step, packs in self._plan_steps(self._position):
                planned.append(step)
                own = [packs[number].families for number in step.pack_numbers]
                del packs  # its rows are held no longer than they must be
                yield from own + [()] * (self._most_packs(step) - len(own))

        build = PackBuilder(self.producer.read_row, self.collator)
        results = build_packs(build, packs_to_build(), self.num_workers, pin_memory=self.pin_memory)
        for first in results:
            step = planned.popleft()
            step = _finish(step, [first, *islice(results, self._most_packs(step) - 1)])
            self._move_to(step.state)
            yield step

    def _most_packs(self, step: StepPacks) -> int:
        """Return how many packs of a step a rank has at most, see `share`."""
        return math.ceil(step.num_packs / self.data_world_size)

    def _plan_steps(self, position: Position) -> Iterator[tuple[StepPacks, list[PlannedPack]]]:
        """Yield the steps from a position to the end of the run, without packs, and all packs to be built for each.

        `StepPacks.pack_numbers` are those that this rank is to build.
        """
        begun: list[PlannedPack] = []
        rejected: list[Reject] = []
        if self._ends(position):
            return
        for window, packs, carry_over in self._planned(position.cursor, position.carry_over, position.skipped):
            if position.taken:
                _check_same_window(window, position)
            else:  # a position inside the window follows a step that has reported all this
                position = position._replace(
                    carry_over=carry_over,
                    num_seen=position.num_seen + window.num_rows,
                    num_dropped=position.num_dropped + window.num_dropped,
                    skipped=window.skipped,
                    content_hash=window.content_hash,
                )
                rejected += window.rejects if self.data_rank == 0 else []
            for number in range(position.taken, len(packs)):
                begun.append(packs[number])
                if len(begun) == self.packs_per_step:
                    position = position._replace(taken=number + 1, steps_done=position.steps_done + 1)
                    ends_epoch = window.ends_epoch and number + 1 == len(packs)
                    yield self._step(begun, window, position, rejected, ends_epoch), begun
                    begun, rejected = [], []
                    if self._ends(position):
                        return
            is_short = window.ends_epoch and bool(begun)
            position = position._replace(
                cursor=window.next_cursor, carry_over=0, taken=0, steps_done=position.steps_done + is_short,
                skipped=[], content_hash=0,
            )  # fmt: skip
            if is_short:
                yield self._step(begun, window, position, rejected, ends_epoch=True), begun
                begun, rejected = [], []
            if self._ends(position):
                return

    def _ends(self, position: Position) -> bool:
        num_steps = self.num_steps if (self.num_epochs or 0) % 1 else self._num_steps
        if num_steps is not None:
            return position.steps_done >= num_steps
        assert self.num_epochs is not None
        return position.cursor["epoch"] >= self.num_epochs

    def _planned(
        self, cursor: Cursor, carry_over: int = 0, skipped: Sequence[int] = ()
    ) -> Iterator[tuple[Window, list[PlannedPack], int]]:
        """Yield (window, its packs in order, packs of it that were carried over) from a cursor on."""
        for window in self.producer.windows(cursor, skipped):
            packs = self._kept[1].get(window.order_seed) if self._kept[0] == window.epoch else None
            packs = self._plan(window, carry_over) if packs is None else packs
            yield window, packs, carry_over
            carry_over = 0 if window.ends_epoch else (carry_over - len(packs)) % self.packs_per_step

    def _plan(self, window: Window, carry_over: int) -> list[PlannedPack]:
        """Pack a window. The order of its packs follows from the window and carry_over alone; or it is its rows'."""
        if not window.families:
            return []
        costs = window.costs
        packs = [
            PlannedPack(
                [window.families[family] for family in pack],
                int(costs.tokens[pack].sum()),
                int(costs.work[pack].sum()),
                int(costs.num_shrunk[pack].sum()),
            )
            for pack in (plan_packs if self.shuffle else pack_in_order)(costs, self.limits)
        ]
        if not self.shuffle:
            return packs
        work = [pack.work for pack in packs]
        order = arrange(work, packs_per_step=self.packs_per_step, carry_over=carry_over, seed=window.order_seed)
        return [packs[number] for number in order]

    def _step(
        self, packs: list[PlannedPack], window: Window, position: Position, rejected: list[Reject], ends_epoch: bool
    ) -> StepPacks:
        keys = [[self.producer.row_key(row) for row in pack.rows] for pack in packs]
        work = [pack.work for pack in packs]
        shares = share(work, self.data_world_size)
        loads = rank_loads(work, shares)
        return StepPacks(
            packs=[],
            pack_numbers=shares[self.data_rank],
            num_packs=len(packs),
            epoch=window.epoch,
            rejected=rejected,
            state=self._state(position),
            balance=max(loads) * self.data_world_size / sum(loads),
            plan_hash=PlanHash.from_plan(position._asdict(), keys),
            ends_epoch=ends_epoch,
            num_shrunk=sum(pack.num_shrunk for pack in packs),
            num_seen=position.num_seen,
            num_dropped=position.num_dropped,
            window_patches=int(window.costs.patches.sum()),
        )


def _finish(step: StepPacks, results: list[PackResult]) -> StepPacks:
    """Return a planned step with its built packs."""
    built = [(number, pack) for number, (pack, _) in zip(step.pack_numbers, results, strict=False) if pack]
    return replace(
        step,
        packs=[pack for _, pack in built],
        pack_numbers=[number for number, _ in built],
        rejected=[reject for result in results for reject in result.rejected] + step.rejected,
    )


def _check_same_window(window: Window, position: Position) -> None:
    """Raise ValueError where a window whose packs were partly trained has changed since."""
    if window.content_hash != position.content_hash:
        lost = window.rejects[0] if window.rejects else "the token counts of its rows differ"
        raise ValueError(
            f"resume: the chunk of the stream that the run stopped in is not what it was: {lost}; put it back, or "
            "start a new run"
        )
