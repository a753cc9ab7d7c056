"""Which samples make which pack, and which rank takes which pack: from costs alone, the same on every machine."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """Estimated work of a pack, in units of one text token through the linear layers of the decoder.

    The numbers are FLOP ratios of Qwen3-VL 4B: 8e9 a token for the decoder's matrices, 3e5*n^2 for causal attention
    over n tokens, 6e8 a patch for the vision blocks, 1e5*p^2 for attention over a frame of p patches.
    """

    token: float = 1.0
    token_pair: float = 3.7e-5
    patch: float = 0.075
    patch_pair: float = 1.2e-5

    def cost(self, tokens: np.ndarray, patches: np.ndarray, patch_pairs: np.ndarray) -> float:
        """Return the cost of a pack of samples with these tokens, patches and sums of squared patches a frame."""
        tokens = tokens.astype(np.float64)
        return float(
            self.token * tokens.sum()
            + self.token_pair * np.square(tokens).sum()
            + self.patch * patches.sum()
            + self.patch_pair * patch_pairs.sum()
        )


def plan_packs(
    costs: np.ndarray, order: np.ndarray, *, max_tokens: int, window: int = 2048, seed: int | Sequence[int]
) -> list[list[int]]:
    """Group rows into packs of at most max_tokens tokens: best-fit decreasing inside a window, then shuffled.

    costs: tokens of every row. order: row numbers as they were shuffled; a row that stands there twice is packed
    twice. window: how many neighbours in order may share a pack. seed: at least one number, for the order of packs.
    Depends on its arguments alone. Raises ValueError for a row without tokens or longer than a pack.
    """
    tokens = np.asarray(costs)[np.asarray(order, dtype=np.int64)]
    wrong = np.flatnonzero((tokens < 1) | (tokens > max_tokens))
    if wrong.size:
        row, size = int(order[wrong[0]]), int(tokens[wrong[0]])
        raise ValueError(f"plan: row {row} has {size} tokens; a pack takes 1 to {max_tokens}, leave the row out")
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        for places in _best_fit(tokens[start : start + window].tolist(), max_tokens):
            packs.append([int(order[start + place]) for place in places])
    shuffle = random_stream(seed).permutation(len(packs))
    return [packs[place] for place in shuffle]


def random_stream(seed: int | Sequence[int]) -> np.random.RandomState:
    """Return a random stream for one or several seeds of any size; each is taken modulo 2**32."""
    # RandomState's stream is frozen for ever, Generator's is not: a run resumed under another numpy keeps its order.
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return np.random.RandomState(np.array([value % 2**32 for value in seeds], dtype=np.uint32))


def _best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing. Returns places in sizes, ascending inside each bin; bins by when they were opened."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # distinct free room of open bins, ascending
    bins_with: dict[int, list[int]] = {}
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        size = sizes[place]
        found = bisect_left(rooms, size)
        if found == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[found]
            number = bins_with[room].pop()
            if not bins_with[room]:
                del bins_with[room], rooms[found]
        bins[number].append(place)
        room -= size
        if room and room in bins_with:
            bins_with[room].append(number)
        elif room:
            insort(rooms, room)
            bins_with[room] = [number]
    return [sorted(places) for places in bins]


def share(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Deal the packs of one step to the ranks: counts differ by at most one, costs are evened out.

    Returns, for each rank, the numbers of its packs, ascending; a rank gets none when there are fewer packs than ranks.
    """
    fewest, extra = divmod(len(costs), world_size)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0.0, rank) for rank in range(world_size)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, rank = heapq.heappop(heap)
        while len(shares[rank]) > fewest or (len(shares[rank]) == fewest and not extra):
            load, rank = heapq.heappop(heap)
        if len(shares[rank]) == fewest:
            extra -= 1
        shares[rank].append(number)
        heapq.heappush(heap, (load + costs[number], rank))
    return [sorted(numbers) for numbers in shares]
