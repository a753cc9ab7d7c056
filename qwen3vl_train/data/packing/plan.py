"""Plan which families make which pack and step, and which rank takes which pack, from their costs alone.

The plan is the same on every machine: all comparisons are between integers, so that no rounding can change it.
"""

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.model.costs import work_ratios

_FULL = 2**40
"""Approximate weight of the full capacity of a limit, whatever its unit."""


@dataclass(frozen=True)
class CostModel:
    """Estimated work of a sample, in units of one text token through the linear layers of the decoder.

    The defaults are FLOP ratios of Qwen3-VL 4B.
    """

    token: float = 1.0
    token_pair: float = 3.7e-5  # in causal attention: as many as the squares of sequence lengths
    patch: float = 0.095
    patch_pair: float = 1.2e-5  # of one frame: as many as the squares of frame sizes

    @classmethod
    def from_arch(cls, arch: Qwen3VLArch, *, text_passes: int = 3, vision_passes: int = 3) -> "CostModel":
        """Take the ratios from the sizes of a model; passes: see `work_ratios`."""
        return cls(1.0, *work_ratios(arch, text_passes=text_passes, vision_passes=vision_passes))

    def work(self, tokens: np.ndarray, patches: np.ndarray, patch_pairs: np.ndarray) -> np.ndarray:
        """Return the work of each sample, int64. That of a pack is the sum: attention never crosses samples."""
        lengths = tokens.astype(np.float64)
        text = self.token * lengths + self.token_pair * lengths * lengths
        return np.rint(text + self.patch * patches + self.patch_pair * patch_pairs).astype(np.int64)


class FamilyCosts(NamedTuple):
    """What families take, each int64 (n,).

    A family is the planning unit: one or more sequences that must lie in one pack. Each row is a family of its own
    today; what shares a prefix or is compared with each other (preference pairs) becomes one family of several.
    """

    tokens: np.ndarray
    patches: np.ndarray
    work: np.ndarray
    num_sequences: np.ndarray
    num_shrunk: np.ndarray  # media that a budget made smaller; only counted: no plan depends on them

    @classmethod
    def from_rows(
        cls, tokens: np.ndarray, patches: np.ndarray, work: np.ndarray, num_shrunk: np.ndarray | None = None
    ) -> "FamilyCosts":
        """Make each row a family of its own."""
        shrunk = np.zeros_like(tokens) if num_shrunk is None else num_shrunk
        return cls(tokens, patches, work, np.ones_like(tokens), shrunk)


@dataclass(frozen=True)
class PackLimits:
    """What a pack holds at most; None: no limit."""

    tokens: int
    patches: int | None = None
    sequences: int | None = None

    def sizes(self, costs: FamilyCosts) -> tuple[np.ndarray, np.ndarray]:
        """Return (sizes (n, L), capacities (L,)) of the L limits that are set, both int64."""
        limits = [(costs.tokens, self.tokens), (costs.patches, self.patches), (costs.num_sequences, self.sequences)]
        columns, capacities = zip(*(limit for limit in limits if limit[1] is not None), strict=True)
        return np.stack(columns, axis=1).astype(np.int64), np.array(capacities, dtype=np.int64)


def plan_packs(costs: FamilyCosts, limits: PackLimits) -> list[list[int]]:
    """Group families into packs within all limits at once: best fit, the largest first, then the lightest topped up.

    Returns the indices of the families of each pack, ascending; each of 0..n-1 is in one pack. The plan depends on the
    arguments alone. Raises ValueError for a family without tokens, or one that fits into no pack.
    """
    sizes, capacities = _checked_sizes(costs, limits)
    packs, rooms = _best_fit(sizes, capacities)
    _top_up(packs, rooms, sizes, costs.work)
    return [sorted(pack) for pack in packs]


def pack_in_order(costs: FamilyCosts, limits: PackLimits) -> list[list[int]]:
    """Group families into packs in their order: a pack ends where the next family does not fit.

    Returns and raises as `plan_packs`.
    """
    sizes, capacities = _checked_sizes(costs, limits)
    packs: list[list[int]] = []
    room = np.zeros_like(capacities)
    for family, size in enumerate(sizes):
        if not packs or (size > room).any():
            packs.append([])
            room = capacities.copy()
        packs[-1].append(family)
        room -= size
    return packs


def _checked_sizes(costs: FamilyCosts, limits: PackLimits) -> tuple[np.ndarray, np.ndarray]:
    sizes, capacities = limits.sizes(costs)
    wrong = np.flatnonzero((sizes[:, 0] < 1) | (sizes > capacities).any(axis=1))
    if wrong.size:
        index = int(wrong[0])
        raise ValueError(
            f"plan: sample {index} has {costs.tokens[index]} tokens and {costs.patches[index]} patches, a pack takes 1 "
            f"to {limits.tokens} tokens and {'any number of' if limits.patches is None else limits.patches} patches; "
            "remove it"
        )
    return sizes, capacities


def _best_fit(sizes: np.ndarray, capacities: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Put each family, the largest first, where least is left of the scarcest limit. Return packs and their room."""
    weights = _FULL // capacities
    order = np.lexsort((np.arange(len(sizes)), -(sizes * weights).max(axis=1)))
    smallest = sizes.min(axis=0)
    packs: list[list[int]] = []
    closed: dict[int, np.ndarray] = {}
    numbers, count = [0] * 64, 0  # packs still open
    rooms = np.empty((len(capacities), 64), dtype=np.int64)  # weighted; a row for each limit
    for family in order.tolist():
        size = sizes[family] * weights
        left = rooms[:, :count] - size[:, None]
        scarcest = left[0] if len(left) == 1 else left.min(axis=0)
        fitting = np.where(scarcest >= 0, scarcest, _FULL)
        at = int(fitting.argmin()) if count else 0
        if not count or fitting[at] == _FULL:
            if count == len(numbers):
                rooms, numbers = np.concatenate([rooms, rooms], axis=1), numbers * 2
            at, count = count, count + 1
            rooms[:, at], numbers[at] = capacities * weights, len(packs)
            packs.append([])
        rooms[:, at] -= size
        packs[numbers[at]].append(family)
        if (rooms[:, at] < smallest * weights).any():  # nothing fits in any more
            closed[numbers[at]] = rooms[:, at].copy()
            count -= 1
            rooms[:, at], numbers[at] = rooms[:, count], numbers[count]
    closed |= {numbers[at]: rooms[:, at] for at in range(count)}
    return packs, np.stack([closed[number] for number in range(len(packs))]) // weights


def _top_up(packs: list[list[int]], rooms: np.ndarray, sizes: np.ndarray, work: np.ndarray) -> None:
    """Move families from the packs of most work to those of least, which best fit leaves nearly empty; in place."""
    loads = [int(work[pack].sum()) for pack in packs]
    mean = sum(loads) // len(loads)
    by_work = sorted(range(len(packs)), key=lambda number: (-loads[number], number))
    for light in reversed(by_work):
        before = loads[light]
        if before * 100 >= mean * 97:
            return
        for heavy in by_work:
            if loads[heavy] <= mean or loads[light] * 100 >= mean * 99:
                break
            for family in sorted(packs[heavy], key=lambda family: (-work[family], family)):
                moved = int(work[family])
                fits = (sizes[family] <= rooms[light]).all()
                if fits and moved <= min(loads[heavy], 2 * mean - loads[light]) - mean:
                    packs[heavy].remove(family)
                    packs[light].append(family)
                    for number, sign in ((heavy, 1), (light, -1)):
                        loads[number] -= sign * moved
                        rooms[number] += sign * sizes[family]
        if loads[light] == before:
            return


def arrange(work: Sequence[int], *, packs_per_step: int, carry_over: int, seed: Sequence[int]) -> list[int]:
    """Put packs in an order in which the packs of a step have like work, so that no rank waits for another.

    The packs carried over, and those left over for the step after the last full one, are of middling work, as the packs
    around them will be. The other steps hold neighbours in work; the steps themselves come in an order drawn from seed.
    Returns the indices 0..n-1 of the packs, each once.

    carry_over: packs that the step already begun still lacks; they come first.
    """
    by_work = sorted(range(len(work)), key=lambda index: (-work[index], index))
    carry_over = min(carry_over, len(by_work))
    single = carry_over + (len(by_work) - carry_over) % packs_per_step
    start = (len(by_work) - single) // 2
    middle, rest = by_work[start : start + single], by_work[:start] + by_work[start + single :]
    steps = [rest[first : first + packs_per_step] for first in range(0, len(rest), packs_per_step)]
    shuffled = [index for number in random_stream(seed).permutation(len(steps)) for index in steps[number]]
    return middle[:carry_over] + shuffled + middle[carry_over:]


def random_stream(seed: int | Sequence[int]) -> np.random.RandomState:
    """Return a random stream for one or several seeds of any size; each is taken modulo 2**32."""
    # The stream of RandomState is frozen, that of Generator is not: a run that is resumed under another numpy
    # keeps its order.
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return np.random.RandomState(np.array([value % 2**32 for value in seeds], dtype=np.uint32))


def share(work: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal the packs of one step to ranks so that their counts differ by at most one and their work is even.

    Returns the indices of each rank's packs, ascending; a rank gets none where there are fewer packs than ranks.
    """
    fewest, extra = divmod(len(work), world_size)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0, rank) for rank in range(world_size)]
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        load, rank = heapq.heappop(heap)
        while len(shares[rank]) > fewest or (len(shares[rank]) == fewest and not extra):
            load, rank = heapq.heappop(heap)
        if len(shares[rank]) == fewest:
            extra -= 1
        shares[rank].append(number)
        heapq.heappush(heap, (load + work[number], rank))
    return [sorted(numbers) for numbers in shares]


def rank_loads(work: Sequence[int], shares: Sequence[Sequence[int]]) -> list[int]:
    """Return the work of each rank. work: of each pack of a step."""
    return [sum(work[number] for number in numbers) for numbers in shares]


class PlanFigures(NamedTuple):
    """How good a plan is.

    balance: (work of the busiest rank) / (mean of all ranks) over full steps, weighted by work: how much longer they
        take than with even ranks.
    """

    fill: float  # tokens in the packs / tokens they could hold
    balance: float
    worst_balance: float  # that of the worst step


def plan_figures(
    tokens: Sequence[int], work: Sequence[int], *, max_tokens: int, packs_per_step: int, world_size: int
) -> PlanFigures:
    """Return how good a plan is. tokens, work: of each pack, in the order of the steps."""
    full_steps = range(0, len(work) - packs_per_step + 1, packs_per_step)
    steps = [work[first : first + packs_per_step] for first in full_steps]
    fill = sum(tokens) / (max_tokens * len(tokens)) if tokens else 0.0
    if not steps:
        return PlanFigures(fill, 1.0, 1.0)
    busiest = [max(rank_loads(step, share(step, world_size))) for step in steps]
    mean = [sum(step) / world_size for step in steps]
    worst = max(most / usual for most, usual in zip(busiest, mean, strict=True))
    return PlanFigures(fill, sum(busiest) / sum(mean), worst)


class PlanHash(NamedTuple):
    """What ranks compare to find that they hold the same plan of a step: 48 bits of a hash each, exact as a float."""

    position: int  # of the loader after the step
    packs: int  # the rows of all packs of all ranks

    @classmethod
    def from_plan(cls, position: dict[str, Any], packs: Any) -> "PlanHash":
        """packs: names or numbers of the rows of each, of a type whose repr is its content."""
        return cls(hash_48(json.dumps(position, sort_keys=True)), hash_48(repr(packs)))

    def combined(self) -> int:
        return hash_48(repr(self))


def hash_48(text: str) -> int:
    """Return 48 bits of a hash, which a float holds exactly."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).digest())
