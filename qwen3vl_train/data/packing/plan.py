"""Which samples make which pack and step, and which rank takes which pack: from costs alone, the same on every machine.

All comparisons are between integers, so that no machine's rounding can change a plan.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.model.costs import work_ratios

_WHOLE = 2**40


@dataclass(frozen=True)
class CostModel:
    """Estimated work of a sample, in units of one text token through the linear layers of the decoder.

    token_pair: for each pair of tokens in causal attention, a sum of squares of sequence lengths. patch_pair: for each
    pair of patches of a frame, a sum of squares of frame sizes. The defaults are FLOP ratios of Qwen3-VL 4B.
    """

    token: float = 1.0
    token_pair: float = 3.7e-5
    patch: float = 0.095
    patch_pair: float = 1.2e-5

    @classmethod
    def from_arch(cls, arch: Qwen3VLArch, *, text_passes: int = 3, vision_passes: int = 3) -> "CostModel":
        """Take the ratios from the sizes of a model; passes: see `work_ratios`."""
        return cls(1.0, *work_ratios(arch, text_passes=text_passes, vision_passes=vision_passes))

    def work(self, tokens: np.ndarray, patches: np.ndarray, patch_pairs: np.ndarray) -> np.ndarray:
        """Return the work of each sample, int64. That of a pack is the sum: attention never crosses samples."""
        lengths = tokens.astype(np.float64)
        exact = (
            self.token * lengths
            + self.token_pair * lengths * lengths
            + self.patch * patches
            + self.patch_pair * patch_pairs
        )
        return np.rint(exact).astype(np.int64)


@dataclass(frozen=True)
class PackLimits:
    """What a pack holds at most; None: no limit."""

    tokens: int
    patches: int | None = None
    sequences: int | None = None

    def sizes(self, tokens: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sizes (n, L), capacities (L,)) of the limits that are set, both int64."""
        columns, capacities = [tokens], [self.tokens]
        if self.patches is not None:
            columns.append(patches)
            capacities.append(self.patches)
        if self.sequences is not None:
            columns.append(np.ones_like(tokens))
            capacities.append(self.sequences)
        return np.stack(columns, axis=1).astype(np.int64), np.array(capacities, dtype=np.int64)


def plan_packs(tokens: np.ndarray, patches: np.ndarray, work: np.ndarray, limits: PackLimits) -> list[list[int]]:
    """Group samples into packs within all limits at once: best fit, the largest first, then the lightest topped up.

    tokens, patches, work: (n,). Returns places 0..n-1, each once, ascending inside a pack. Depends on its arguments
    alone. Raises ValueError for a sample without tokens, or one that fits into no pack.
    """
    sizes, capacities = limits.sizes(np.asarray(tokens), np.asarray(patches))
    wrong = np.flatnonzero((sizes[:, 0] < 1) | (sizes > capacities).any(axis=1))
    if wrong.size:
        place = int(wrong[0])
        raise ValueError(
            f"plan: sample {place} has {tokens[place]} tokens and {patches[place]} patches, a pack takes 1 to "
            f"{limits.tokens} tokens and {'any number of' if limits.patches is None else limits.patches} patches; "
            "leave it out"
        )
    packs, rooms = _best_fit(sizes, capacities)
    _top_up(packs, rooms, sizes, np.asarray(work))
    return [sorted(pack) for pack in packs]


def _best_fit(sizes: np.ndarray, capacities: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Put each sample, the largest first, where least is left of the scarcest limit. Returns packs and their room."""
    weights = _WHOLE // capacities  # a limit's full capacity weighs about _WHOLE, whatever its unit
    order = np.lexsort((np.arange(len(sizes)), -(sizes * weights).max(axis=1)))
    smallest = sizes.min(axis=0)
    packs: list[list[int]] = []
    closed: dict[int, np.ndarray] = {}
    numbers, count = [0] * 64, 0  # packs still open
    rooms = np.empty((len(capacities), 64), dtype=np.int64)  # weighted; a row for each limit
    for place in order.tolist():
        size = sizes[place] * weights
        left = rooms[:, :count] - size[:, None]
        scarcest = left[0] if len(left) == 1 else left.min(axis=0)
        fitting = np.where(scarcest >= 0, scarcest, _WHOLE)
        at = int(fitting.argmin()) if count else 0
        if not count or fitting[at] == _WHOLE:
            if count == len(numbers):
                rooms, numbers = np.concatenate([rooms, rooms], axis=1), numbers * 2
            at, count = count, count + 1
            rooms[:, at], numbers[at] = capacities * weights, len(packs)
            packs.append([])
        rooms[:, at] -= size
        packs[numbers[at]].append(place)
        if (rooms[:, at] < smallest * weights).any():  # nothing fits in any more
            closed[numbers[at]] = rooms[:, at].copy()
            count -= 1
            rooms[:, at], numbers[at] = rooms[:, count], numbers[count]
    closed |= {numbers[at]: rooms[:, at] for at in range(count)}
    return packs, np.stack([closed[number] for number in range(len(packs))]) // weights


def _top_up(packs: list[list[int]], rooms: np.ndarray, sizes: np.ndarray, work: np.ndarray) -> None:
    """Move samples from the packs of most work to those of least, which best fit leaves nearly empty; in place."""
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
            for place in sorted(packs[heavy], key=lambda place: (-work[place], place)):
                moved = int(work[place])
                if moved <= min(loads[heavy], 2 * mean - loads[light]) - mean and (sizes[place] <= rooms[light]).all():
                    packs[heavy].remove(place)
                    packs[light].append(place)
                    for number, sign in ((heavy, 1), (light, -1)):
                        loads[number] -= sign * moved
                        rooms[number] += sign * sizes[place]
        if loads[light] == before:
            return


def arrange(work: Sequence[int], *, packs_per_step: int, lead: int, seed: Sequence[int]) -> list[int]:
    """Put packs in an order in which the packs of a step are alike in work, so that no rank waits for another.

    lead: packs that the step already begun still lacks; they come first. They, and those left over for the step after
    the last whole one, are packs of middling work, as the packs around them will be. The other steps hold neighbours
    in work; the steps themselves come in an order drawn from seed. Returns places 0..n-1, each once.
    """
    by_work = sorted(range(len(work)), key=lambda place: (-work[place], place))
    lead = min(lead, len(by_work))
    single = lead + (len(by_work) - lead) % packs_per_step
    start = (len(by_work) - single) // 2
    middle, rest = by_work[start : start + single], by_work[:start] + by_work[start + single :]
    steps = [rest[first : first + packs_per_step] for first in range(0, len(rest), packs_per_step)]
    shuffled = [place for number in random_stream(seed).permutation(len(steps)) for place in steps[number]]
    return middle[:lead] + shuffled + middle[lead:]


def random_stream(seed: int | Sequence[int]) -> np.random.RandomState:
    """Return a random stream for one or several seeds of any size; each is taken modulo 2**32."""
    # RandomState's stream is frozen for ever, Generator's is not: a run resumed under another numpy keeps its order.
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return np.random.RandomState(np.array([value % 2**32 for value in seeds], dtype=np.uint32))


def share(work: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal the packs of one step to the ranks: counts differ by at most one, work is evened out.

    Returns, for each rank, the numbers of its packs, ascending; a rank gets none when there are fewer packs than ranks.
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
    """Return the work of each rank. work: of each pack of a step. shares: of the ranks, as `share` deals them."""
    return [sum(work[number] for number in numbers) for numbers in shares]


class PlanFigures(NamedTuple):
    """fill: tokens in the packs / tokens they could hold. balance: (work of the busiest rank) / (mean of all ranks),
    over whole steps, weighted by work: how much longer they take than with even ranks. worst_balance: of one step.
    """

    fill: float
    balance: float
    worst_balance: float


def plan_figures(
    tokens: Sequence[int], work: Sequence[int], *, max_tokens: int, packs_per_step: int, world_size: int
) -> PlanFigures:
    """Say how good a plan is. tokens, work: of each pack, in the order of the steps."""
    busiest, mean = [], []
    for first in range(0, len(work) - packs_per_step + 1, packs_per_step):
        of_step = work[first : first + packs_per_step]
        loads = rank_loads(of_step, share(of_step, world_size))
        busiest.append(max(loads))
        mean.append(sum(loads) / world_size)
    fill = sum(tokens) / (max_tokens * len(tokens)) if tokens else 0.0
    if not mean:
        return PlanFigures(fill, 1.0, 1.0)
    worst = max(most / usual for most, usual in zip(busiest, mean, strict=True))
    return PlanFigures(fill, sum(busiest) / sum(mean), worst)
