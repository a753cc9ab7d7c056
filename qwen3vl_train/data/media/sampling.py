"""Choose frames of a clip: from a part of it, at a rate or of a number, at even or at uneven times."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.clips import FRAMES_PER_PATCH, ClipRules, sample_indices

_EPSILON = 1e-6  # seconds: 0.28 is within a clip from 7 / 25
_OVERRUN_SECONDS = 1.0
"""By which `end` may exceed the clip: annotations are rounded to whole seconds."""


@dataclass(frozen=True)
class Timeline:
    """The times of a clip's frames, in seconds: of even rate (index / fps), or one by one, ascending."""

    num_frames: int
    fps: float
    times: Sequence[float] | None = None

    def time(self, index: int) -> float:
        return index / self.fps if self.times is None else self.times[index]

    @property
    def end(self) -> float:
        """The second at which the last frame ends; of uneven times, it is shown as long as the mean one."""
        if self.times is None:
            return self.num_frames / self.fps
        first, last = self.times[0], self.times[-1]
        return last + (last - first) / max(self.num_frames - 1, 1)

    def segment(self, start: float | None, end: float | None) -> range:
        """Return the indices of the frames at start <= time <= end. Raise MediaFault where they are fewer than two.

        None is the beginning or the end of the clip. `start` and `end` count from the beginning of the file.
        """
        if start is None and end is None:
            return range(self.num_frames)
        first, last = 0.0 if start is None else start, self.end if end is None else end
        if first >= last or first >= self.end:
            fault = (
                f"start {first:g} is beyond it" if first >= self.end else f"start {first:g} is not before end {last:g}"
            )
            raise MediaFault(f"the clip ends at {self.end:.2f} seconds, {fault}; correct start and end (in seconds)")
        if last > self.end + _OVERRUN_SECONDS:
            fault = f"the clip ends at {self.end:.2f} seconds, end {last:g} is beyond it"
            raise MediaFault(f"{fault}; correct end (in seconds), or remove it to use the rest of the clip")
        times = np.arange(self.num_frames) / self.fps if self.times is None else np.asarray(self.times)
        inside = np.nonzero((times >= first - _EPSILON) & (times <= last + _EPSILON))[0]
        if len(inside) < FRAMES_PER_PATCH:
            frames = f"{len(inside)} of the clip's {self.num_frames} frames (up to {times[-1]:.2f})"
            fault = f"{frames} between start {first:g} and end {last:g}, 2 are needed"
            raise MediaFault(f"{fault}; move them apart")
        return range(int(inside[0]), int(inside[-1]) + 1)

    def choose(self, within: range, rules: ClipRules) -> list[int]:
        """Return the indices of the sampled frames, from the first within a range to the last.

        Frames of an even rate are evenly spaced, as transformers' Qwen3VLVideoProcessor and qwen-vl-utils take them.
        Of uneven times, the frames nearest to evenly spaced times are taken, each once: where the picture stays for
        long there are fewer than the rate asks for, but never fewer than min_frames.
        """
        if self.times is None:
            return sample_indices(len(within), self.fps, rules, first=within.start)
        times = np.asarray(self.times)[within.start : within.stop]
        span = float(times[-1] - times[0])
        seconds = span * len(times) / (len(times) - 1)
        # Rounding may make 3.9999999 of the 4 frames in two seconds.
        count = min(max(int(seconds * rules.fps + _EPSILON), rules.min_frames), rules.max_frames, len(times))
        wanted = np.linspace(times[0], times[-1], count)
        right = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
        nearest = right - (wanted - times[right - 1] <= times[right] - wanted)
        chosen = np.unique(nearest)
        least = min(rules.min_frames, count)
        if len(chosen) < least:
            chosen = _spread(nearest[np.linspace(0, count - 1, least).round().astype(int)], len(times))
        return (within.start + chosen).tolist()


def _spread(indices: np.ndarray, num_frames: int) -> np.ndarray:
    """Return ascending indices, moved as little as needed for no two of them to be equal."""
    order = np.arange(len(indices))
    rising = np.maximum.accumulate(indices - order) + order
    most = num_frames - len(indices) + order
    return np.minimum(rising, most)


def rules_of_clip(rules: ClipRules, target_fps: float | None, num_frames: int | None) -> ClipRules:
    """Return the rules with the rate or the number of frames that a row asks for. Raise MediaFault below two frames.

    num_frames is rounded to an even number, halves to a multiple of four, as in qwen-vl-utils. The recipe's max_frames
    and the clip's own number of frames remain the limit.
    """
    if num_frames is not None:
        even = round(num_frames / FRAMES_PER_PATCH) * FRAMES_PER_PATCH
        if even < FRAMES_PER_PATCH:
            raise MediaFault(f"{num_frames} frames asked for, a clip needs 2; ask for more, or give an image")
        count = min(even, rules.max_frames)
        return rules._replace(min_frames=count, max_frames=count)
    return rules if target_fps is None else rules._replace(fps=target_fps)
