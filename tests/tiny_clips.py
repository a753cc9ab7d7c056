"""Small clips for the tests: written with PyAV, decoded independently of the package, prepared as transformers does."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def moving(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 in which every pixel depends on its place and its time."""
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.int64)
    channels = [(x * 7 + y * 13 + t * 29) % 256, (x * x + 3 * y + t * t) % 251, ((x * y) ^ (x + 5 * y + 11 * t)) % 256]
    return np.stack(channels, -1).astype(np.uint8)


def smooth(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 that a codec keeps nearly as they are: ramps that drift."""
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.float64)
    channels = [128 + 90 * np.sin((x + 3 * t) / 17), 128 + 90 * np.cos((y + 2 * t) / 13), (x + y + 5 * t) % 200 + 20]
    return np.stack(channels, -1).astype(np.uint8)


def write_clip(
    path: Path,
    num_frames: int = 24,
    *,
    size: tuple[int, int] = (96, 64),
    rate: int | Fraction = 12,
    codec: str = "libx264",
    gop: int = 10,
    rotation: int = 0,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write a clip of `smooth` frames; size is width x height. rotation: counter-clockwise, as phones write it."""
    width, height = size
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = out.add_stream("aac", rate=8000) if audio else None
        for pixels in smooth(num_frames, height, width):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
        if sound is not None:
            _write_silence(out, sound)
    return path


def _write_silence(out: Any, stream: Any) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def decode(path: Path) -> Tensor:
    """All frames as PyAV gives them when it decodes from the beginning: uint8 (T, 3, H, W). Rotation is not applied."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def oracle_patches(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Prepare sampled frames as Qwen3VLVideoProcessor does: float32 (P, 1536). size: (height, width) of smart_resize.

    That class needs torchvision. Its steps are: bicubic resize on uint8, rescale, normalise, repeat an odd last frame,
    cut. Written down here once more; `tests/data/test_clips.py` holds bytes that the class itself gave.
    """
    frames = F.interpolate(frames_TCHW, size=size, mode="bicubic", antialias=True)
    frames = (frames.float() - 127.5) / 127.5
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    pairs, rows, cols = len(frames) // 2, size[0] // 16, size[1] // 16
    cut = frames.view(1, pairs, 2, 3, rows // 2, 2, 16, cols // 2, 2, 16)
    return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(pairs * rows * cols, 1536)
