"""Budgets in visual tokens: of an image, of a clip, of all media of a sample together."""

import random
from dataclasses import replace

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.budgets import Budgets, Size
from qwen3vl_train.data.media.clips import ClipRules
from tests.helpers.messages import message_of

BUDGETS = Budgets(64 * 64, 2048 * 2048, ClipRules(2.0, 4, 768, 4096, 25165824))


def tokens(grids) -> int:
    return sum(t * h * w for t, h, w in grids) // 4


def fit(limit: int | None, sizes):
    """Return the grids and the number of shrunk media within a budget of the whole sample."""
    budgets = replace(BUDGETS, max_tokens_per_sample=limit)
    grids = budgets.fit(sizes, [budgets.grid(size) for size in sizes])
    return grids, budgets.count_shrunk(sizes, grids)


def test_grids_count_patches_and_frame_pairs():
    assert BUDGETS.grid(Size(300, 400)) == (1, 18, 24)
    assert BUDGETS.grid(Size(96, 160, 4)) == (2, 6, 10)
    assert BUDGETS.grid(Size(96, 160, 5)) == (3, 6, 10)
    assert BUDGETS.grid(Size(300, 400), max_pixels=64 * 1024) == (1, 12, 18)
    assert BUDGETS.grid(Size(96, 160, 4), max_pixels=8 * 2048) == (2, 2, 4)


def test_all_media_shrink_by_one_factor():
    """An image and a clip with equal frame areas keep equal areas, and all keep their shapes."""
    sizes = [Size(1024, 1024), Size(1024, 512), Size(1024, 1024, 8)]
    grids, num_shrunk = fit(1500, sizes)
    assert num_shrunk == 3
    assert 0.8 * 1500 < tokens(grids) <= 1500
    (_, height, width), (_, half_height, half_width), (pairs, of_clip, across) = grids
    assert (height, half_height) == (width, 2 * half_width)
    assert (pairs, of_clip, across) == (4, height, width)


def test_budget_is_kept_and_used():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [
            Size(rng.randint(40, 1200), rng.randint(40, 1200), rng.choice([0, 0, rng.randint(2, 20)]))
            for _ in range(rng.randint(1, 6))
        ]
        alone = [BUDGETS.grid(size) for size in sizes]
        assert fit(None, sizes)[0] == alone
        least = sum((size.num_frames + 1) // 2 or 1 for size in sizes)
        limit = rng.randint(4 * least, max(4 * least, 2 * tokens(alone)))
        grids, num_shrunk = fit(limit, sizes)
        assert tokens(grids) <= limit
        if tokens(alone) <= limit:
            assert (grids, num_shrunk) == (alone, 0)
        else:
            assert num_shrunk > 0
            assert all(tokens([grid]) <= tokens([before]) for grid, before in zip(grids, alone, strict=True))
            more = fit(limit + 1, sizes)[0]  # a larger budget never makes anything smaller
            assert all(tokens([grid]) <= tokens([larger]) for grid, larger in zip(grids, more, strict=True))


def test_budget_below_one_token_per_medium_is_a_fault():
    sizes = [Size(64, 64)] * 3 + [Size(64, 64, 9)]
    assert fit(8, sizes)[0] == [(1, 2, 2)] * 3 + [(5, 2, 2)]
    assert message_of(RowFault, fit, 7, sizes) == (
        "4 images and clips take at least 8 visual tokens, more than data.max_visual_tokens_per_sample 7; "
        "raise it or give fewer"
    )


def test_many_media_are_fitted_quickly():
    sizes = [Size(500 + place % 7, 400) for place in range(3000)]
    grids, num_shrunk = fit(30_000, sizes)
    assert tokens(grids) <= 30_000
    assert num_shrunk == 3000
