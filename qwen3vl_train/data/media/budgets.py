"""Limits on the visual tokens of images and clips, and the grids of patches within them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.clips import FRAMES_PER_PATCH, ClipRules, resize_clip
from qwen3vl_train.data.media.image import MERGE, PATCH, smart_resize

Grid = tuple[int, int, int]
"""Patches of one medium: time, height, width."""

_NUM_BISECTIONS = 20


@dataclass(frozen=True)
class PixelLimits:
    """Limits of one medium of a row, beside those of the recipe: keys of the parts that Qwen's own scripts read.

    min_pixels, max_pixels: limits on the area of the resized image, or of one resized frame. min_pixels replaces the
        recipe's; max_pixels can only lower the recipe's, which is what its packs and its memory were planned for.
    height, width: the size that the medium counts as before the limits apply; both or neither.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    height: int | None = None
    width: int | None = None


NO_LIMITS = PixelLimits()


class Size(NamedTuple):
    """The size of a medium before it is resized, in pixels.

    num_frames: 0 for an image.
    limits: those that its row sets, see `PixelLimits`.
    """

    height: int
    width: int
    num_frames: int = 0
    limits: PixelLimits = NO_LIMITS


@dataclass(frozen=True)
class Budgets:
    """Limits on the media of one sample.

    min_pixels, max_pixels: limits on the area of a resized image.
    clips: rules for clips; None where the checkpoint has no video settings.
    max_tokens_per_sample: limit on the visual tokens of all media of a sample together; None: no limit.
    max_image_pixels: larger images and frames are not decoded; None: Pillow's own limit.
    """

    min_pixels: int
    max_pixels: int
    clips: ClipRules | None = None
    max_tokens_per_sample: int | None = None
    max_image_pixels: int | None = None

    def grid(self, size: Size, max_pixels: int | None = None) -> Grid:
        """Return the grid of one medium within its own limits. max_pixels: replaces its own. Raise MediaFault.

        Limits that the row sets for a clip hold for one frame, as in qwen-vl-utils. A maximum of the row never raises
        that of the recipe.
        """
        rules = self.clips if size.num_frames else self
        assert rules is not None, "a clip was measured without rules for clips"
        limits, num_frames = size.limits, size.num_frames or 1
        least, most = rules.min_pixels, rules.max_pixels
        if limits.min_pixels is not None:
            least = limits.min_pixels * num_frames
        if max_pixels is not None:
            most = max_pixels
        elif limits.max_pixels is not None:
            # `resize_clip` counts an odd number of frames as an even one: neither count may exceed the frame's limit.
            counted = round(num_frames / FRAMES_PER_PATCH) * FRAMES_PER_PATCH if size.num_frames else 1
            most = min(most, limits.max_pixels * min(num_frames, counted))
        least = min(least, most)
        height, width = limits.height or size.height, limits.width or size.width
        if size.num_frames:
            rows, cols = resize_clip(size.num_frames, height, width, min_pixels=least, max_pixels=most)
        else:
            rows, cols = smart_resize(height, width, min_pixels=least, max_pixels=most)
        return -(-size.num_frames // FRAMES_PER_PATCH) or 1, rows // PATCH, cols // PATCH

    def fit(self, sizes: Sequence[Size], grids: Sequence[Grid], max_tokens: int | None = None) -> list[Grid]:
        """Return the grids of all media of a sample, shrunk by a common factor where the sample's budget is exceeded.

        The area of each is limited to the same fraction of its own, the largest fraction that fits. Raise RowFault
        where even the smallest sizes have too many tokens. max_tokens: a tighter budget, from the length of the sample.
        """
        budget, field = self.max_tokens_per_sample, "data.max_visual_tokens_per_sample"
        if max_tokens is not None and (budget is None or max_tokens < budget):
            budget, field = max_tokens, "the limit on the whole sample leaves them,"
        if budget is None or num_tokens(grids) <= budget:
            return list(grids)
        smallest = num_tokens(self._scale(sizes, grids, 0.0))
        if smallest > budget:
            fault = f"{len(sizes)} images and clips take at least {smallest} visual tokens, more than {field} {budget}"
            raise RowFault(f"{fault}; raise it or give fewer", kind="too_long")
        fits, too_large = 0.0, 1.0
        for _ in range(_NUM_BISECTIONS):
            middle = (fits + too_large) / 2
            is_within = num_tokens(self._scale(sizes, grids, middle)) <= budget
            fits, too_large = (middle, too_large) if is_within else (fits, middle)
        return self._scale(sizes, grids, fits)

    def count_shrunk(self, sizes: Sequence[Size], grids: Sequence[Grid]) -> int:
        """Return the number of media whose grid a limit made smaller than their own size would give."""
        full = [self.grid(size, max_pixels=2**62) for size in sizes]
        return sum(num_tokens([most]) > num_tokens([grid]) for most, grid in zip(full, grids, strict=True))

    def _scale(self, sizes: Sequence[Size], grids: Sequence[Grid], fraction: float) -> list[Grid]:
        return [
            self.grid(size, max(1, int(fraction * (PATCH**2 * height * width * (size.num_frames or 1)))))
            for size, (_, height, width) in zip(sizes, grids, strict=True)
        ]


def num_tokens(grids: Sequence[Grid]) -> int:
    """Return the number of visual tokens of grids of patches."""
    return sum(time * height * width for time, height, width in grids) // MERGE**2
