"""Small clips for the tests: written with PyAV, decoded independently of the package, prepared as transformers does."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def moving(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 in which every pixel depends on its position and its time."""
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.int64)
    channels = [(x * 7 + y * 13 + t * 29) % 256, (x * x + 3 * y + t * t) % 251, ((x * y) ^ (x + 5 * y + 11 * t)) % 256]
    return np.stack(channels, -1).astype(np.uint8)


def smooth(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 that a codec preserves almost exactly: moving ramps."""
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


def trim_clip(path: Path, target: Path, num_frames: int) -> Path:
    """Copy a clip without its first frames and without encoding it again: they stay in the file, unseen."""
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts -= num_frames * packet.duration
                packet.dts -= num_frames * packet.duration
                packet.stream = copy
                out.mux(packet)
    return target


def write_timed(
    path: Path,
    ticks: Sequence[int],
    *,
    unit: Fraction = Fraction(1, 1000),
    rate: int | None = None,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write a clip of `smooth` frames that are shown at these times, in units of seconds. rate: what the file declares,
    where its container has room for it."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = stream.time_base = unit
        stream.codec_context.gop_size = 10
        for tick, pixels in zip(ticks, smooth(len(ticks), size[1], size[0]), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def _write_silence(out: Any, stream: Any) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def decode(path: Path) -> Tensor:
    """Return all frames that PyAV decodes from the beginning: uint8 (T, 3, H, W). Rotation is not applied."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def oracle_patches(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Prepare sampled frames as Qwen3VLVideoProcessor does: float32 (P, 1536). size: (height, width) of smart_resize.

    That class needs torchvision. Its steps are: bicubic resize on uint8, rescale, normalise, repeat an odd last frame,
    cut. Repeated here; `tests/data/media/test_clips.py` has bytes that the class itself gave.
    """
    frames = F.interpolate(frames_TCHW, size=size, mode="bicubic", antialias=True)
    frames = (frames.float() - 127.5) / 127.5
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    pairs, rows, cols = len(frames) // 2, size[0] // 16, size[1] // 16
    cut = frames.view(1, pairs, 2, 3, rows // 2, 2, 16, cols // 2, 2, 16)
    return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(pairs * rows * cols, 1536)


def oracle_inputs(folder: Path, messages: list[dict[str, Any]], *, wrapped: bool) -> dict[str, Tensor]:
    """Prepare one conversation of pictures (PIL) and clips (paths of upright files) for the stock model, as one row.

    Times and placeholders are written by transformers' own Qwen3VLProcessor, sizes found by its own smart_resize.
    wrapped: as transformers 5.10 to 5.23 put them in place of `<|video_pad|>`; otherwise, as before and in Qwen's code,
    in place of it and the vision start and end around it.
    """
    from transformers import AutoTokenizer

    from tests.helpers import oracles

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    inputs: dict[str, list[Any]] = {"image": [], "image_grid": [], "video": [], "video_grid": []}
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                patches, grid = oracles.oracle_pixels(folder, part["image"])
                inputs["image"].append(patches)
                inputs["image_grid"].append(grid)
                text = text.replace("<|image_pad|>", "<|done|>" * (grid[1] * grid[2] // 4), 1)
            elif part["type"] == "video":
                patches, grid, placeholders = _oracle_clip(folder, part["video"])
                inputs["video"].append(patches)
                inputs["video_grid"].append(grid)
                marked = "<|video_pad|>" if wrapped else "<|vision_start|><|video_pad|><|vision_end|>"
                text = text.replace(marked, placeholders.replace("<|video_pad|>", "<|seen|>"), 1)
    text = text.replace("<|done|>", "<|image_pad|>").replace("<|seen|>", "<|video_pad|>")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = sum((number * (ids == tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>")).int())
                for number, name in ((1, "image"), (2, "video")))  # fmt: skip
    out: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
    for name, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if inputs[name]:
            out |= {key: torch.cat(inputs[name]), f"{name}_grid_thw": torch.tensor(inputs[f"{name}_grid"])}
    return out


def _oracle_clip(folder: Path, path: str) -> tuple[Tensor, tuple[int, int, int], str]:
    """Sample, resize and cut one clip: patches, grid, and the text that the processor puts in for it."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
    from transformers.video_utils import VideoMetadata

    limits = json.loads((folder / "video_preprocessor_config.json").read_text())["size"]
    frames = decode(Path(path))
    with av.open(path) as container:
        fps = float(container.streams.video[0].average_rate)
    count = min(max(int(len(frames) / fps * 2), 4), 768, len(frames))
    indices = np.linspace(0, len(frames) - 1, count).round().astype(int)
    size = smart_resize(
        count, frames.shape[2], frames.shape[3], factor=32, min_pixels=limits["shortest_edge"],
        max_pixels=limits["longest_edge"],
    )  # fmt: skip
    grid = (-(-count // 2), size[0] // 16, size[1] // 16)
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>", vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *arguments: Qwen3VLProcessor._calculate_timestamps(None, *arguments),
    )  # fmt: skip
    metadata = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=indices)
    of_clip = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    return oracle_patches(frames[indices], size), grid, Qwen3VLProcessor.replace_video_token(processor, of_clip, 0)
