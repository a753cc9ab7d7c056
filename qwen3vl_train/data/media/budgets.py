"""How large each image and clip of a sample may be, counted in visual tokens, and the grids of patches that follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.clips import FRAMES_PER_PATCH, ClipRules, resize_clip
from qwen3vl_train.data.media.image import MERGE, PATCH, smart_resize

Grid = tuple[int, int, int]
"""Patches of one medium: time, height, width."""

_HALVINGS = 20
_NO_LIMIT = 2**62


class Size(NamedTuple):
    """A medium before it is resized, in pixels. num_frames: 0 for a still."""

    height: int
    width: int
    num_frames: int = 0


class Fitted(NamedTuple):
    """grids: one for each medium. num_shrunk: media that a budget made smaller than they are."""

    grids: list[Grid]
    num_shrunk: int


@dataclass(frozen=True)
class Budgets:
    """min_pixels, max_pixels: area of a resized image. clips: None where the checkpoint says nothing of video.

    max_tokens_per_sample: visual tokens of all media of a sample together; None: no limit.
    """

    min_pixels: int
    max_pixels: int
    clips: ClipRules | None = None
    max_tokens_per_sample: int | None = None

    def grid(self, size: Size, max_pixels: int | None = None) -> Grid:
        """Return the grid of one medium within its own limits. max_pixels: a tighter one. Raises MediaFault."""
        limits = self.clips if size.num_frames else self
        assert limits is not None, "a clip was measured without rules for clips"
        most = limits.max_pixels if max_pixels is None else max_pixels
        least = min(limits.min_pixels, most)
        if size.num_frames:
            rows, cols = resize_clip(size.num_frames, size.height, size.width, min_pixels=least, max_pixels=most)
        else:
            rows, cols = smart_resize(size.height, size.width, min_pixels=least, max_pixels=most)
        return -(-size.num_frames // FRAMES_PER_PATCH) or 1, rows // PATCH, cols // PATCH

    def fit(self, sizes: Sequence[Size], max_tokens: int | None = None) -> Fitted:
        """Resize every medium within its own limits, then all alike until the sample's budget holds.

        "Alike": the area of each is limited to the same fraction of what it would have been, the largest fraction that
        fits. max_tokens: a tighter budget, from the length of the whole sample. Raises MediaFault for extreme shapes,
        RowFault where even the smallest sizes are too many tokens.
        """
        grids = [self.grid(size) for size in sizes]
        whole = [self.grid(size, max_pixels=_NO_LIMIT) for size in sizes]
        budget, field = self.max_tokens_per_sample, "data.max_visual_tokens_per_sample"
        if max_tokens is not None and (budget is None or max_tokens < budget):
            budget, field = max_tokens, "the limit on the whole sample leaves them,"
        if budget is not None and _tokens(grids) > budget:
            grids = self._fit_alike(sizes, grids, budget, field)
        return Fitted(grids, sum(_tokens([one]) > _tokens([other]) for one, other in zip(whole, grids, strict=True)))

    def _fit_alike(self, sizes: Sequence[Size], grids: Sequence[Grid], budget: int, field: str) -> list[Grid]:
        smallest = _tokens(self._shrunk(sizes, grids, 0.0))
        if smallest > budget:
            raise RowFault(
                f"{len(sizes)} images and clips take at least {smallest} visual tokens, more than {field} {budget}; "
                "raise it or give fewer",
                kind="too_long",
            )
        fits, too_much = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (fits + too_much) / 2
            if _tokens(self._shrunk(sizes, grids, middle)) <= budget:
                fits = middle
            else:
                too_much = middle
        return self._shrunk(sizes, grids, fits)

    def _shrunk(self, sizes: Sequence[Size], grids: Sequence[Grid], fraction: float) -> list[Grid]:
        areas = [
            PATCH**2 * height * width * (size.num_frames or 1)
            for size, (_, height, width) in zip(sizes, grids, strict=True)
        ]
        return [self.grid(size, max(1, int(fraction * area))) for size, area in zip(sizes, areas, strict=True)]


def _tokens(grids: Sequence[Grid]) -> int:
    return sum(time * height * width for time, height, width in grids) // MERGE**2
