"""Frames, times, size and patches of a clip: the arithmetic of Qwen3-VL's video processor."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import FACTOR, MAX_ASPECT, PATCH, fit_area, resize_to_patches

FRAMES_PER_PATCH = 2
MIN_FPS, MAX_FPS = 0.0001, 1000
"""Limits on the rate of a clip: one frame in three hours, and high-speed cameras."""


class ClipRules(NamedTuple):
    """How frames of a clip are sampled and resized.

    fps: frames sampled per second.
    min_frames, max_frames: limits on the number of sampled frames, which never exceeds that of the clip.
    min_pixels, max_pixels: limits on the area of a resized frame times the number of frames.
    """

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int


def sample_indices(num_frames: int, clip_fps: float, rules: ClipRules, *, first: int = 0) -> list[int]:
    """Return the indices of the sampled frames, evenly spaced from the first to the last.

    first: index of the first of these frames, where they are a segment of a clip.
    Agrees with `sample_frames` of transformers' Qwen3VLVideoProcessor (halves round to even): 24 frames at 12 fps,
    sampled at 2 fps -> 0, 8, 15, 23.
    """
    count = min(max(int(num_frames / clip_fps * rules.fps), rules.min_frames), rules.max_frames, num_frames)
    return np.linspace(first, first + num_frames - 1, count).round().astype(int).tolist()


def pair_times(times: Sequence[float]) -> list[float]:
    """Return the mean time of each pair of frames; an odd last one is repeated. 0.0, 0.5, 1.0 -> 0.25, 1.0."""
    padded = [*times, times[-1]] if len(times) % FRAMES_PER_PATCH else times
    return [(first + second) / 2 for first, second in zip(padded[::2], padded[1::2], strict=True)]


def resize_clip(num_frames: int, height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) to resize every frame to.

    Agrees with `smart_resize` of transformers 5's Qwen3VLVideoProcessor: limits hold for the whole clip, a side below
    32 pixels is scaled up first, and an odd number of frames is rounded to an even one by halves to even (5 counts as
    4, 7 as 8) in the test against the limits, though not in the scale. Raise MediaFault beyond 200:1.
    """
    if height < FACTOR or width < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        fault = f"frames of {width}x{height}: their aspect ratio exceeds {MAX_ASPECT}:1; crop or pad them"
        raise MediaFault(fault, kind="unsupported_media")
    counted = round(num_frames / FRAMES_PER_PATCH) * FRAMES_PER_PATCH
    return fit_area(height, width, num_frames, counted, min_pixels=min_pixels, max_pixels=max_pixels)


def clip_patches(frames: Iterable[tuple[int, Tensor]], indices: Sequence[int], grid: tuple[int, int, int]) -> Tensor:
    """Resize frames one at a time, as they come, and cut them into uint8 (P, 1536) patches of frame pairs.

    frames: (index, uint8 (3, H, W)) in any order, each of `indices` at least once.
    grid: frame pairs, then rows and columns of patches.
    A patch is (channel, frame of the pair, row, column), flattened; an odd last frame is repeated. Bit-equal to
    transformers' Qwen3VLVideoProcessor on the same frames.
    """
    pairs, rows, cols = grid
    patches = torch.empty(pairs, rows * cols, 3, FRAMES_PER_PATCH, PATCH * PATCH, dtype=torch.uint8)
    slots: dict[int, list[int]] = {}
    for slot in range(pairs * FRAMES_PER_PATCH):
        slots.setdefault(indices[min(slot, len(indices) - 1)], []).append(slot)
    missing = set(slots)
    for index, rgb in frames:
        frame = resize_to_patches(rgb, (rows, cols)).view(rows * cols, 3, PATCH * PATCH)
        for slot in slots[index]:
            patches[slot // FRAMES_PER_PATCH, :, :, slot % FRAMES_PER_PATCH] = frame
        missing.discard(index)
    assert not missing, f"frames {sorted(missing)[:5]} of the clip are missing"
    return patches.view(pairs * rows * cols, 3 * FRAMES_PER_PATCH * PATCH * PATCH)


def repeat_still_frames(patches: Tensor) -> Tensor:
    """Repeat the one frame of stills, (P, 768) -> (P, 1536), the shape of clips. Clips are returned unchanged."""
    if patches.shape[1] != 3 * PATCH * PATCH:
        return patches
    return patches.view(-1, 3, 1, PATCH * PATCH).expand(-1, -1, FRAMES_PER_PATCH, -1).flatten(1)
