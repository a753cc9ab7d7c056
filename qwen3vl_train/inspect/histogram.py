"""Bins that suit a spread of values: whole numbers, even steps, powers of two, or ratios."""

import math

import numpy as np

from qwen3vl_train.inspect.facts import Histogram

_BINS = 24
_LONG_TAIL = 16  # from a maximum of 16 medians on, even steps would put nearly all rows into the first bin
_RATIO_EDGES = [2.0 ** (step / 4) for step in range(-13, 14, 2)]  # bins around 1:8, 1:5.7, 1:4 ... 1:1 ... 8:1


def histogram(values: np.ndarray) -> Histogram:
    """Sort numbers of at least 0 into bins. [1, 1, 3] -> edges 1 2 3 4, counts 2 0 1."""
    if not values.size:
        return Histogram("unit", [], [])
    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    if high - low < _BINS and bool(np.all(values == np.floor(values))):
        return _filled("unit", values, np.arange(low, high + 2))
    if high > _LONG_TAIL * max(middle, 1.0):
        first = math.floor(math.log2(max(low, 1.0)))
        powers = 2.0 ** np.arange(first, math.floor(math.log2(high)) + 2)
        return _filled("log", values, powers if low >= 1 else np.concatenate([[0.0], powers]))
    step = _round_up((high - low) / _BINS)
    start = math.floor(low / step) * step
    count = max(1, math.ceil((high - start) / step))
    return _filled("linear", values, start + step * np.arange(count + 1))


def ratio_histogram(values: np.ndarray) -> Histogram:
    """Sort ratios of width to height into bins that treat wide and tall alike."""
    return _filled("ratio", values, np.array(_RATIO_EDGES)) if values.size else Histogram("ratio", [], [])


def _round_up(step: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... so that edges are numbers a person would choose."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * (1 - 1e-9))


def _filled(scale: str, values: np.ndarray, edges: np.ndarray) -> Histogram:
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return Histogram(
        scale,
        [round(float(edge), 6) for edge in edges],
        np.bincount(places, minlength=len(edges) - 1).tolist(),
        float(values.min()),
        float(np.median(values)),
        float(values.mean()),
        float(np.percentile(values, 95)),
        float(values.max()),
        float(values.sum()),
    )
