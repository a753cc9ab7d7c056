"""One image or clip of a sample: measured from its header, later decoded to patches."""

from typing import NamedTuple

from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.budgets import Grid, Size
from qwen3vl_train.data.media.clips import ClipRules, clip_patches, pair_times, sample_indices
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.image import image_size, load_rgb, resize_to_patches
from qwen3vl_train.data.media.paths import ImageInput, describe
from qwen3vl_train.data.media.video import VideoHeader, read_header
from qwen3vl_train.data.rows.sample import ImagePart, VideoPart


class Measured(NamedTuple):
    """What the header of a medium says. indices: sampled frames of a clip; times: seconds of each pair of them."""

    size: Size
    indices: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    header: VideoHeader | None = None


def measure(part: ImagePart | VideoPart, rules: ClipRules | None, media_root: str | None) -> Measured:
    """Measure an image or a clip without decoding it. Raise MediaFault."""
    if isinstance(part, ImagePart):
        return Measured(Size(*image_size(part.image, media_root)))
    if rules is None:
        fault = "video: the checkpoint has no video_preprocessor_config.json; copy it from its publisher"
        raise MediaFault(fault, kind="unsupported_media")
    if isinstance(part.video, tuple):
        return _measure_frames(part, part.video, rules, media_root)
    header = read_header(part.video, media_root)
    indices = sample_indices(header.num_frames, header.fps, rules)
    times = pair_times([index / header.fps for index in indices])
    return Measured(Size(header.height, header.width, len(indices)), tuple(indices), tuple(times), header)


def _measure_frames(part: VideoPart, frames: tuple, rules: ClipRules, media_root: str | None) -> Measured:
    """Measure a list of frames: with a frame rate they are sampled, with timestamps all are used."""
    if part.timestamps is not None:
        indices, times = list(range(len(frames))), list(part.timestamps)
        if len(frames) > rules.max_frames:
            raise MediaFault(
                f"list of {len(frames)} frames: more than the limit of {rules.max_frames}; give fewer, give fps "
                "instead of their times to have them sampled, or raise data.max_frames",
                kind="too_long",
            )
    else:
        assert part.fps is not None, part
        indices = sample_indices(len(frames), part.fps, rules)
        times = [index / part.fps for index in indices]
    sizes = [image_size(frames[index], media_root) for index in indices]
    for index, size in zip(indices, sizes, strict=True):
        if size != sizes[0]:
            fault = f"is {size[1]}x{size[0]}, the first frame of its clip {sizes[0][1]}x{sizes[0][0]}"
            raise MediaFault(f"{describe(frames[index])}: {fault}; give frames of one size")
    return Measured(Size(*sizes[0], len(indices)), tuple(indices), tuple(pair_times(times)))


def read_patches(part: ImagePart | VideoPart, measured: Measured, grid: Grid, media_root: str | None) -> Tensor:
    """Decode a medium to patches: uint8 (P, 768) of an image, (P, 1536) of a clip. Raise MediaFault.

    A file that decodes to a size other than its header's is a fault: its cost was planned from the header.
    """
    if isinstance(part, ImagePart):
        return resize_to_patches(_load(part.image, measured, media_root), grid[1:])
    if isinstance(part.video, tuple):
        frames = ((index, _load(part.video[index], measured, media_root)) for index in measured.indices)
    else:
        assert measured.header is not None, part
        frames = read_frames(part.video, measured.indices, measured.header, media_root)
    return clip_patches(frames, measured.indices, grid)


def _load(source: ImageInput, measured: Measured, media_root: str | None) -> Tensor:
    rgb = load_rgb(source, media_root)
    if rgb.shape[1:] != measured.size[:2]:
        height, width, _ = measured.size
        fault = f"decodes to {rgb.shape[2]}x{rgb.shape[1]}, its header says {width}x{height}"
        raise MediaFault(f"{describe(source)}: {fault}; replace it")
    return rgb
