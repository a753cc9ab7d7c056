"""Steps of packs for one rank: a plan is dealt to ranks, and worker processes build what is dealt to this one."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.plan import rank_loads, share
from qwen3vl_train.data.packing.shared_memory import SharedMemoryPack
from qwen3vl_train.data.packing.workers import in_workers


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

    def __call__(self, planned: Any) -> tuple[SharedMemoryPack | None, list[Reject]]:
        pack, rejected = self.build(planned)
        return SharedMemoryPack.from_pack(pack) if pack else None, rejected


class PlanMark(NamedTuple):
    """What two ranks compare to find that they hold the same plan of a step: 48 bits of a hash each, exact as a float.

    position: of where the loader stands behind it. packs: of the rows of all packs of all ranks.
    """

    position: int
    packs: int

    @classmethod
    def from_plan(cls, position: dict[str, Any], packs: Any) -> "PlanMark":
        """packs: names or numbers of the rows of each, of a kind whose repr is its content."""
        return cls(mark_of(json.dumps(position, sort_keys=True)), mark_of(repr(packs)))

    def both(self) -> int:
        return mark_of(repr(self))


def mark_of(words: str) -> int:
    """Return 48 bits of a hash, which a float holds exactly."""
    return int.from_bytes(hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=6).digest())


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step that this rank trains on.

    packs may be empty: a short last step has fewer packs than ranks, or all rows of a pack were broken.
    pack_numbers: place of each pack among the packs of the step over all ranks. num_packs: planned packs of the step
    over all ranks. epoch: counted from 0. rejected: rows of this rank that broke when decoded, and, on rank 0, rows of
    a stream that cannot be used. state: where the loader stands AFTER this step, as JSON, the same on every rank; save
    it with what the step has trained. num_shrunk: media in the step, over all ranks, that a budget made smaller.
    num_seen, num_dropped: rows looked at since the run began, and those of them left out by `too_long: drop`. balance:
    planned work of the busiest rank, over the mean of all ranks. mark: the same on every rank, or they have not planned
    the same.

    Which source a sample is of is in its name: `rows.parse.dataset_of(name)` for each of `PackedBatch.sample_ids`.
    """

    packs: list[PackedBatch]
    pack_numbers: list[int]
    num_packs: int
    epoch: int
    rejected: list[Reject]
    state: dict[str, Any]
    balance: float
    mark: PlanMark
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
    mark: PlanMark
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

    The plan is walked once, by whatever asks for the next pack to build, and at the same pace on every rank: a rank
    with fewer packs in a step builds packs of nothing in their place. So ranks that walk a plan which rank 0 tells them
    as it goes (see `StreamLoader`) ask for a step of it only when rank 0 is about to do so too.
    """
    planned: deque[tuple[PlannedStep, list[list[int]]]] = deque()

    def to_build() -> Iterator[Any]:
        for step in steps:
            shares = share(step.work, world_size)
            packs, step.packs = step.packs, []
            planned.append((step, shares))
            mine = [packs[number] for number in shares[rank]]
            yield from mine + [()] * (_most(shares) - len(mine))

    results = build_packs(build, to_build(), num_workers, pin_memory=pin_memory)
    for result in results:
        step, shares = planned.popleft()
        of_step = [result, *islice(results, _most(shares) - 1)][: len(shares[rank])]
        built = [(number, pack) for number, (pack, _) in zip(shares[rank], of_step, strict=True) if pack is not None]
        loads = rank_loads(step.work, shares)
        yield StepPacks(
            packs=[pack for _, pack in built],
            pack_numbers=[number for number, _ in built],
            num_packs=len(step.work),
            epoch=step.epoch,
            rejected=[reject for _, rejected in of_step for reject in rejected] + (step.rejected if rank == 0 else []),
            state=step.state,
            balance=max(loads) * world_size / sum(loads),
            mark=step.mark,
            num_shrunk=step.num_shrunk,
            num_seen=step.num_seen,
            num_dropped=step.num_dropped,
        )


def _most(shares: Sequence[Sequence[int]]) -> int:
    return max(map(len, shares))
