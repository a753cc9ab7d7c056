"""The limits that a row sets for one medium."""

from dataclasses import dataclass


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
