"""The training loader of sources that come row after row and need not say how many rows they have.

A window of rows is read, looked at and packed, then the next. Memory holds a few windows, however long the stream. A
position is where its window begins and how many packs of it are used up: going on reads that window again.

Rank 0 looks at the rows (text and headers only) and leaves what it found for the others, which read the rows alone. So
all hold the same plan whatever a rank may fail to read; and every rank plans all packs, so that nothing depends on the
number of ranks.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.errors import Reject, RowFault
from qwen3vl_train.data.packing.index import LengthRule
from qwen3vl_train.data.packing.loader import changed_media, check_fingerprint, check_run, check_weights
from qwen3vl_train.data.packing.mixture import Cursor, Mixture, Part
from qwen3vl_train.data.packing.plan import CostModel, PackLimits, arrange, plan_packs
from qwen3vl_train.data.packing.steps import PackResult, PlanMark, PlannedStep, StepPacks, deal_steps
from qwen3vl_train.data.packing.windows import PIECES_AHEAD, Scanner, StreamedRow, Window, follow
from qwen3vl_train.data.packing.workers import from_worker
from qwen3vl_train.data.rows.media_files import stamp_of


class Broadcast(Protocol):
    """Messages from rank 0 to all other ranks, as JSON; `receive` waits for a message that is not sent yet."""

    def send(self, key: str, message: Any) -> None: ...

    def receive(self, key: str) -> Any: ...


class _BuildSamples:
    """Builds packs from samples, in a worker process or in this one."""

    def __init__(self, collator: MultimodalCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[StreamedRow]) -> PackResult:
        encoded: list[EncodedSample] = []
        rejected: list[Reject] = []
        for row in rows:
            try:
                if isinstance(row.sample, RowFault):
                    raise row.sample
                made = self.collator.encode(row.sample)
                if made.input_ids.numel() != row.tokens or stamp_of(row.sample) != row.stamp:
                    raise RowFault(changed_media(row.sample, "read"), kind="changed")
            except RowFault as fault:
                rejected.append(Reject.from_fault(row.file, row.number, fault))
            else:
                encoded.append(made)
        return PackResult(self.collator.pack(encoded) if encoded else None, rejected)


class _Position(NamedTuple):
    """The next step begins behind the first `taken` packs of the window at `cursor`.

    lead: packs of this window that complete the last step of the window before, see `arrange`. num_seen, num_dropped:
    rows before this window since the run began. left_out, mark: what was found of this window, where some of it is
    used up (`Window`): read again, it must give the same plan, whatever can be read by then.
    """

    cursor: Cursor
    lead: int
    taken: int
    steps_done: int
    num_seen: int
    num_dropped: int
    left_out: list[int]
    mark: int


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
        broadcast: Broadcast | None = None,
    ) -> None:
        """Prepare; nothing is read until iteration.

        window: rows that are planned together. Exactly one of num_epochs and num_steps ends the run. With workers, one
        more process reads the stream. broadcast: by which rank 0 tells the others what it found; every rank must
        iterate as often as rank 0 does, with as many workers. Without one a rank looks at the rows itself, and has the
        same steps only while every rank can read every row. Raises ValueError for settings out of range.
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
        self._broadcast, self._num_rounds = broadcast, 0
        self.cost_model = cost_model or CostModel()
        mixture = Mixture(parts, seed)
        self._scanner = Scanner(mixture, collator, rule, window)
        self._position = _Position(mixture.start(), 0, 0, 0, 0, 0, [], 0)
        self.num_seen = 0
        """Rows looked at for the steps yielded so far, since the run began."""
        self.fingerprint: dict[str, Any] = {
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
        return {**position._asdict(), "seen": seen, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step whose `StepPacks.state` this is; call it before iterating.

        Rank and world size may differ from those of the run that saved it. Raises ValueError that names what of the
        data or the plan is not as it was.
        """
        check_fingerprint(state["fingerprint"], self.fingerprint)
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
        for window in self._windows(position.cursor, position.left_out):
            if position.taken:
                _check_same_again(window, position)
            position = position._replace(left_out=window.left_out, mark=window.mark())
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
            lead = 0 if short else -len(begun) % self.packs_per_step
            position = _Position(window.behind, lead, 0, position.steps_done + short, *seen, [], 0)
            if short:
                yield self._step(begun, window.epoch, position, seen, rejected)
                begun, rejected = [], []
            if self._ends(position):
                return

    def _windows(self, cursor: Cursor, left_out: list[int]) -> Iterator[Window]:
        """Yield the windows from a cursor on, the same on every rank."""
        in_process = self.num_workers == 0
        if self._broadcast is None or self.world_size == 1:
            return from_worker(self._scanner.windows, (cursor, left_out), in_process=in_process)
        self._num_rounds += 1
        keys = (f"{self._num_rounds}/{number}" for number in count())
        if self.rank == 0:
            windows = from_worker(self._scanner.windows, (cursor, left_out), in_process=in_process)
            return _post(windows, self._broadcast, keys)
        pieces = from_worker(self._scanner.pieces, cursor, in_process=in_process, ahead=PIECES_AHEAD)
        return follow(_posted(self._broadcast, keys), pieces)

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
        state = self._state(position, seen[0])
        names = [[(row.file.rpartition("/")[2], row.number, row.tokens) for row in pack.rows] for pack in packs]
        return PlannedStep(
            packs=[pack.rows for pack in packs],
            work=[pack.work for pack in packs],
            epoch=epoch,
            state=state,
            mark=PlanMark.from_plan({**state, "fingerprint": None}, names),
            num_shrunk=sum(pack.num_shrunk for pack in packs),
            num_seen=seen[0],
            num_dropped=seen[1],
            rejected=rejected,
        )


class _PlannedPack(NamedTuple):
    rows: list[StreamedRow]
    work: int
    num_shrunk: int


def _check_same_again(window: Window, position: _Position) -> None:
    """Raise ValueError where a window of which packs were trained is not as it was then."""
    if window.mark() != position.mark:
        lost = window.rejects[0] if window.rejects else "the token counts of its rows differ"
        raise ValueError(
            f"resume: the stretch of the stream that the run stopped in is not what it was: {lost}; put it back, or "
            "start a new run"
        )


def _post(windows: Iterator[Window], broadcast: Broadcast, keys: Iterator[str]) -> Iterator[Window]:
    """Leave what was found of each window for the other ranks, and how reading ends where it fails."""
    for key in keys:
        try:
            window = next(windows)
        except Exception as error:  # whatever it is, the others wait for it
            broadcast.send(key, {"fault": str(error), "mend": isinstance(error, ValueError)})
            raise
        broadcast.send(key, window.outcome())
        yield window


def _posted(broadcast: Broadcast, keys: Iterator[str]) -> Iterator[dict[str, Any]]:
    for key in keys:
        note = broadcast.receive(key)
        if "fault" in note:
            raise (ValueError if note["mend"] else RuntimeError)(note["fault"])
        yield note
