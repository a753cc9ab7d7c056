"""Every value is counted once, in the right bin, and the bins are ones that a person would choose."""

import numpy as np
import pytest

from qwen3vl_train.inspect.facts import histogram, ratio_histogram

SPREADS = {
    "few whole numbers": np.array([1, 1, 3]),
    "one value": np.array([7, 7]),
    "even": np.arange(0, 1000, 7),
    "upper end on an edge": np.array([0, 50, 100] * 10),
    "long tail": np.array([10] * 90 + [20000, 3]),
    "long tail from zero": np.array([0] * 50 + [5000]),
    "fractions": np.linspace(0.1, 0.9, 17),
}


@pytest.mark.parametrize("name", SPREADS)
def test_counts_agree_with_a_plain_loop(name):
    values = SPREADS[name]
    found = histogram(values)
    pairs = list(zip(found.edges, found.edges[1:], strict=False))
    last = len(pairs) - 1
    expected = [
        sum(low <= value < high or (bin == last and value == high) for value in values)
        for bin, (low, high) in enumerate(pairs)
    ]
    assert found.counts == expected
    assert sum(found.counts) == len(values)
    assert len(found.counts) <= 26
    assert (found.minimum, found.maximum, found.total) == (values.min(), values.max(), pytest.approx(values.sum()))
    assert found.median == pytest.approx(np.median(values))


def test_scale_follows_the_spread():
    assert histogram(np.array([1, 1, 3])).edges == [1, 2, 3, 4]
    assert histogram(SPREADS["even"]).edges == list(range(0, 1001, 50))
    assert histogram(SPREADS["long tail"]).scale == "log"
    assert histogram(SPREADS["long tail from zero"]).edges[:3] == [0, 1, 2]


def test_without_values_there_are_no_bins():
    assert histogram(np.array([])).counts == []
    assert ratio_histogram(np.array([])).counts == []


def test_ratio_bins_are_symmetric_and_keep_extremes():
    ratios = np.array([1.0, 2.0, 0.5, 4.0, 0.25, 180.0, 1 / 180])
    counts = ratio_histogram(ratios).counts
    assert counts == counts[::-1]
    assert sum(counts) == len(ratios)
    assert counts[len(counts) // 2] == 1  # the square
