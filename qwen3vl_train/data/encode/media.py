"""One image or clip of a sample: measured from its header, later decoded to patches."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.budgets import Budgets, Grid, Size
from qwen3vl_train.data.media.clips import ClipRules, clip_patches, pair_times
from qwen3vl_train.data.media.folders import is_folder, list_frames
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.image import image_size, load_rgb, resize_to_patches
from qwen3vl_train.data.media.paths import ImageInput, describe
from qwen3vl_train.data.media.sampling import Timeline, rules_of_clip
from qwen3vl_train.data.media.video import VideoHeader, read_header
from qwen3vl_train.data.rows.sample import ImagePart, VideoPart


class Measured(NamedTuple):
    """What the header of a medium says.

    indices: sampled frames of a clip.
    times: seconds of each pair of them, from the beginning of the file.
    header: of a video file.
    frames: the images of a clip that is a list or a folder of them, else empty.
    """

    size: Size
    indices: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    header: VideoHeader | None = None
    frames: tuple[ImageInput, ...] = ()

    @property
    def uneven(self) -> bool:
        """Whether it is a video file whose own frame rate is not that of its frames, see `VideoHeader.uneven`."""
        return self.header is not None and self.header.uneven


def measure(part: ImagePart | VideoPart, budgets: Budgets, media_root: str | None) -> Measured:
    """Measure an image or a clip without decoding it. Raise MediaFault."""
    limit = budgets.max_image_pixels
    if isinstance(part, ImagePart):
        return Measured(Size(*image_size(part.image, media_root, limit), limits=part.limits))
    if budgets.clips is None:
        fault = "video: the checkpoint has no video_preprocessor_config.json; copy it from its publisher"
        raise MediaFault(fault, kind="unsupported_media")
    rules = rules_of_clip(budgets.clips, part.target_fps, part.num_frames)
    if isinstance(part.video, tuple):
        return _measure_frames(part, part.video, rules, budgets, media_root)
    if isinstance(part.video, str) and is_folder(part.video, media_root):
        part = _with_rate_of_folder(part, part.video)
        rules = rules_of_clip(budgets.clips, part.target_fps, part.num_frames)
        return _measure_frames(part, list_frames(str(part.video), media_root), rules, budgets, media_root)
    given = [key for key in ("fps", "sample_fps", "timestamps") if getattr(part, key) is not None]
    if given:
        fault = f"{' and '.join(given)} of a video file, whose header has the times; remove it"
        raise MediaFault(f"{describe(part.video, 'video')}: {fault}", kind="conflicting_fields")
    header = read_header(part.video, media_root, limit)
    line = Timeline(header.num_frames, header.fps, header.times)
    with _naming(describe(part.video, "video")):
        indices = line.choose(line.segment(part.start, part.end), rules)
    times = pair_times([line.time(index) for index in indices])
    return Measured(Size(header.height, header.width, len(indices), part.limits), tuple(indices), tuple(times), header)


def _with_rate_of_folder(part: VideoPart, folder: str) -> VideoPart:
    """Return the part with the rate of its frames, which rows of a folder write as the target_fps of a file."""
    if part.fps is None and part.sample_fps is None and part.timestamps is None:
        part = replace(part, fps=part.target_fps, target_fps=None)
    if part.fps is None and part.sample_fps is None and part.timestamps is None:
        fault = "is a folder of frames without their rate; write sample_fps next to it (all frames are used), or fps"
        raise MediaFault(f"video {folder}: {fault} (they are sampled)", kind="no_frame_rate")
    return part


def _measure_frames(
    part: VideoPart, frames: tuple[ImageInput, ...], rules: ClipRules, budgets: Budgets, media_root: str | None
) -> Measured:
    """Measure frames that are images: with fps they are sampled, with sample_fps or timestamps all are used."""
    rate = part.sample_fps if part.fps is None else part.fps
    assert rate is not None or part.timestamps is not None, part
    if part.timestamps is not None and len(part.timestamps) != len(frames):
        fault = f"{len(part.timestamps)} times for {len(frames)} frames; give one for each frame"
        raise MediaFault(f"{_name(part)}: {fault}", kind="invalid_value")
    line = Timeline(len(frames), rate or 1.0, part.timestamps)
    with _naming(_name(part)):
        within = line.segment(part.start, part.end)
        if part.fps is None and part.target_fps is None and part.num_frames is None:
            indices = list(within)
        else:
            indices = line.choose(within, rules)
    if len(indices) > rules.max_frames:
        raise MediaFault(
            f"list of {len(indices)} frames: more than the limit of {rules.max_frames}; give fewer, give fps "
            "instead of their times to have them sampled, or raise data.max_frames",
            kind="too_long",
        )
    sizes = [image_size(frames[index], media_root, budgets.max_image_pixels) for index in indices]
    for index, size in zip(indices, sizes, strict=True):
        if size != sizes[0]:
            fault = f"is {size[1]}x{size[0]}, the first frame of its clip {sizes[0][1]}x{sizes[0][0]}"
            raise MediaFault(f"{describe(frames[index])}: {fault}; give frames of one size")
    times = pair_times([line.time(index) for index in indices])
    size = Size(*sizes[0], len(indices), part.limits)
    return Measured(size, tuple(indices), tuple(times), frames=frames)


def _name(part: VideoPart) -> str:
    return f"list of {len(part.video)} frames" if isinstance(part.video, tuple) else describe(part.video, "video")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a medium before its faults."""
    try:
        yield
    except MediaFault as fault:
        raise fault.at(name) from None


def read_patches(
    part: ImagePart | VideoPart, measured: Measured, grid: Grid, media_root: str | None, max_pixels: int | None = None
) -> Tensor:
    """Decode a medium to patches: uint8 (P, 768) of an image, (P, 1536) of a clip. Raise MediaFault.

    A file that decodes to a size other than its header's is a fault: its cost was planned from the header.
    max_pixels: `data.max_image_pixels`.
    """
    if isinstance(part, ImagePart):
        return resize_to_patches(_load(part.image, measured, media_root, max_pixels), grid[1:])
    if measured.header is None:
        images = measured.frames
        frames = ((index, _load(images[index], measured, media_root, max_pixels)) for index in measured.indices)
    else:
        assert not isinstance(part.video, tuple), part
        frames = read_frames(part.video, measured.indices, measured.header, media_root)
    return clip_patches(frames, measured.indices, grid)


def _load(source: ImageInput, measured: Measured, media_root: str | None, max_pixels: int | None) -> Tensor:
    rgb = load_rgb(source, media_root, max_pixels)
    if rgb.shape[1:] != measured.size[:2]:
        height, width = measured.size[:2]
        fault = f"decodes to {rgb.shape[2]}x{rgb.shape[1]}, its header says {width}x{height}"
        raise MediaFault(f"{describe(source)}: {fault}; replace it")
    return rgb
