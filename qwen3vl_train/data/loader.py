"""The training loader: plans every epoch from costs, deals packs to ranks, builds them in worker processes, resumes.

What makes which pack and step depends on the data, the seed and the budgets, never on ranks, workers or timing. So the
position is three numbers, and a run goes on exactly where it was, also on another number of ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject, RowFault
from qwen3vl_train.data.index import Index
from qwen3vl_train.data.plan import CostModel, plan_packs, random_stream, share
from qwen3vl_train.data.sources import Source


class PackResult(NamedTuple):
    """What a worker makes of one planned pack; pack is None when every row of it turned out broken."""

    pack: PackedBatch | None
    rejected: list[Reject]


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step that this rank trains on.

    packs may be empty: a short last step has fewer packs than ranks, or all rows of a pack were broken.
    pack_numbers: place of each pack among the packs of the step over all ranks. num_packs: planned packs of the step
    over all ranks. epoch: counted from 0. rejected: rows of this rank that broke when decoded. state: where the loader
    stands AFTER this step, as JSON, the same on every rank; save it with what the step has trained.
    """

    packs: list[PackedBatch]
    pack_numbers: list[int]
    num_packs: int
    epoch: int
    rejected: list[Reject]
    state: dict[str, Any]


class _Position(NamedTuple):
    """Where the loader stands: the next step is step_in_epoch (from 0) of epoch, or the first of the one behind it."""

    epoch: int
    step_in_epoch: int
    steps_done: int


class _PackDataset(Dataset):
    """Builds packs from row numbers, in a worker process or in this one."""

    def __init__(self, sources: Sequence[Source], collator: MultimodalCollator, index: Index) -> None:
        self.sources, self.collator, self.index = sources, collator, index

    def __getitem__(self, rows: Sequence[int]) -> PackResult:
        encoded, rejected = [], []
        for number in rows:
            place, row = self.index.locate(number)
            source = self.sources[place]
            try:
                sample = self.collator.encode(source.sample(row))
                if sample.input_ids.numel() != self.index.tokens[number]:
                    raise RowFault(
                        f"sample has {sample.input_ids.numel()} tokens but had {self.index.tokens[number]} when it was "
                        "indexed; its row or its images changed since, start again"
                    )
            except RowFault as fault:
                rejected.append(Reject(source.name, source.row_number(row), str(fault)))
            else:
                encoded.append(sample)
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _build(dataset: _PackDataset, rows: "_Rows", num_workers: int, pin_memory: bool) -> DataLoader:
    """Start the workers. Results come in the order asked for; a worker that dies raises RuntimeError here."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=rows,  # type: ignore[arg-type]  (an iterable of row lists: each is one item)
        num_workers=num_workers,
        worker_init_fn=_one_thread,
        pin_memory=pin_memory,
    )


class _Rows:
    """The rows of the packs to come, in order; the DataLoader asks for them a little ahead of time."""

    def __init__(self, make: Callable[..., Iterator[tuple[int, ...]]], *arguments: Any) -> None:
        self.make, self.arguments = make, arguments

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self.make(*self.arguments)


class TrainLoader:
    """Yields the steps of a training run for one rank, from the beginning or from a loaded state."""

    def __init__(
        self,
        sources_with_weights: Sequence[tuple[Source, float]],
        collator: MultimodalCollator,
        index: Index,
        *,
        packs_per_step: int,
        max_tokens_per_pack: int,
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

        sources_with_weights: weight 1 is every row once an epoch, 2 twice, 0.5 another random half each epoch.
        Exactly one of num_epochs and num_steps ends the run. packs_per_step counts the packs of all ranks. Raises
        ValueError for settings out of range and for data that holds no step.
        """
        self.sources = [source for source, _ in sources_with_weights]
        self.weights = [float(weight) for _, weight in sources_with_weights]
        self._check(index, packs_per_step, num_epochs, num_steps)
        self.index, self.collator = index, collator
        self.packs_per_step, self.max_tokens, self.seed, self.window = packs_per_step, max_tokens_per_pack, seed, window
        self.rank, self.world_size, self.num_workers, self.pin_memory = rank, world_size, num_workers, pin_memory
        self.num_epochs, self._num_steps = num_epochs, num_steps
        self.cost_model = cost_model or CostModel()
        self._position = _Position(0, 0, 0)
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        self._fingerprint = {
            "sources": [source.fingerprint() for source in self.sources],
            "weights": self.weights,
            "costs": index.digest(),
            "seed": seed,
            "max_tokens_per_pack": max_tokens_per_pack,
            "packs_per_step": packs_per_step,
            "window": window,
        }

    def _check(self, index: Index, packs_per_step: int, num_epochs: int | None, num_steps: int | None) -> None:
        lengths = [len(source) for source in self.sources]
        assert np.diff(index.starts).tolist() == lengths, f"index of other sources: {index.starts}, rows {lengths}"
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"data.train: {source.name}: weight is {weight}; use a number above 0")
        if packs_per_step < 1:
            raise ValueError(f"train.packs_per_step: got {packs_per_step}; use at least 1")
        if (num_epochs is None) == (num_steps is None):
            raise ValueError(f"train: num_epochs is {num_epochs} and num_steps is {num_steps}; give one of them")
        if (num_epochs or num_steps or 0) < 1:
            raise ValueError(f"train: num_epochs is {num_epochs} and num_steps is {num_steps}; use at least 1")
        if not index.num_usable:
            raise ValueError("data.train: no usable row; mend the rows that rejected.jsonl lists")

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
            seed = (self.seed, epoch, 1)
            packs = plan_packs(self.index.tokens, order, max_tokens=self.max_tokens, window=self.window, seed=seed)
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
        theirs = state["fingerprint"]
        changed = [key for key, value in self._fingerprint.items() if theirs.get(key) != value]
        if changed:
            what = {"sources": "the data files", "costs": "the rows' token counts"}
            names = ", ".join(
                what.get(key, f"{key} ({theirs.get(key)} then, {self._fingerprint[key]} now)") for key in changed
            )
            raise ValueError(
                f"resume: {names} changed since the checkpoint, so the run cannot go on exactly; put them back or "
                "start a new run"
            )
        self._position = _Position(state["epoch"], state["step_in_epoch"], state["steps_done"])

    def _steps(self, start: _Position) -> Iterator[tuple[_Position, list[list[int]]]]:
        """Yield (position behind the step, its packs over all ranks) from a position to the end of the run."""
        epoch, step, done = start
        while done < self.num_steps:
            packs = self.epoch_packs(epoch)
            while step * self.packs_per_step < len(packs) and done < self.num_steps:
                of_step = packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]
                step, done = step + 1, done + 1
                yield _Position(epoch, step, done), of_step
            epoch, step = epoch + 1, 0

    def _rows(self, start: _Position) -> Iterator[tuple[int, ...]]:
        """Yield the rows of each pack of this rank."""
        for _, packs in self._steps(start):
            for number in self._share(packs):
                yield tuple(packs[number])

    def _share(self, packs: list[list[int]]) -> list[int]:
        index = self.index
        costs = [self.cost_model.cost(index.tokens[p], index.patches[p], index.patch_pairs[p]) for p in packs]
        return share(costs, self.world_size)[self.rank]

    def __iter__(self) -> Iterator[StepPacks]:
        """Yield the steps from the position on; the position moves as steps are yielded."""
        start = self._position
        dataset = _PackDataset(self.sources, self.collator, self.index)
        results = iter(_build(dataset, _Rows(self._rows, start), self.num_workers, self.pin_memory))
        for position, packs in self._steps(start):
            numbers, built, rejected = [], [], []
            for number in self._share(packs):
                pack, broken = next(results)
                rejected += broken
                if pack is not None:
                    numbers.append(number)
                    built.append(pack)
            self._position = position
            yield StepPacks(built, numbers, len(packs), position.epoch, rejected, self.state())


def eval_packs(
    source: Source,
    collator: MultimodalCollator,
    index: Index,
    *,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[PackResult]:
    """Yield the packs of an evaluation file in its order, every usable row once; rank r takes packs r, r + world, ...

    index: of this source alone. Ranks may get different numbers of packs.
    """
    packs: list[list[int]] = []
    room = 0
    for number in index.usable(0).tolist():
        tokens = int(index.tokens[number])
        if not packs or tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(number)
        room -= tokens
    mine = _Rows(iter, [tuple(rows) for rows in packs[rank::world_size]])
    yield from _build(_PackDataset([source], collator, index), mine, num_workers, pin_memory=False)
