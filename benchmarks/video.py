"""Measure what clips cost on one core: `python benchmarks/video.py`. Times are CPU seconds of this process.

A clip is generated (H.264 with x264's defaults: groups of up to 250 frames, three B frames between others), and read as
the loader reads it: first the header, then sampled frames, which are resized and cut into patches.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch

from qwen3vl_train.data.media.clips import ClipRules, clip_patches, resize_clip, sample_indices
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.video import read_header


def write(path: Path, minutes: float, width: int, height: int, fps: int) -> None:
    """Write a clip in which everything moves, with some grain, so that it is not too easy to decode."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    grain = rng.integers(-12, 13, (height, width, 1))
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(minutes * 60 * fps)):
            planes = [(x + 3 * number) % 256, (y + 2 * number) % 256, (x + y - number) % 256]
            pixels = np.clip(np.stack(planes, -1) + np.roll(grain, 7 * number, axis=1), 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
    """Reset the peak to the memory in use now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return (result, CPU seconds, bytes by which the peak rose above the memory in use before)."""
    reset_peak()
    before, start = peak_bytes(), time.process_time()
    result = call()
    return result, time.process_time() - start, peak_bytes() - before


def patches_of(path: str, rules: ClipRules) -> torch.Tensor:
    header = read_header(path)
    indices = sample_indices(header.num_frames, header.fps, rules)
    limits = {"min_pixels": rules.min_pixels, "max_pixels": rules.max_pixels}
    rows, cols = resize_clip(len(indices), header.height, header.width, **limits)
    grid = (-(-len(indices) // 2), rows // 16, cols // 16)
    return clip_patches(read_frames(path, indices, header), indices, grid)


def decode_all(path: str) -> int:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--clip", type=Path, help="measure this file instead of a generated one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--size", default="640x360", help="width x height")
    parser.add_argument("--fps", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        path = args.clip or Path(scratch) / "clip.mp4"
        if args.clip is None:
            width, height = map(int, args.size.split("x"))
            write(path, args.minutes, width, height, args.fps)
        header, seconds, _ = timed(lambda: read_header(str(path)))
        raw = header.num_frames * header.height * header.width * 3
        print(f"{path.name}: {header.num_frames} frames of {header.width}x{header.height} at {header.fps:g} a second,")
        print(f"{path.stat().st_size / 1e6:.1f} MB, {raw / 1e6:.0f} MB decoded")
        print(f"\nheader                      {1e3 * seconds:8.1f} ms")
        count, seconds, _ = timed(lambda: decode_all(str(path)))
        print(f"decode all, nothing kept    {seconds:8.2f} s  {count / seconds:8.0f} frames a second")
        for frames in (8, 64, 768):
            rules = ClipRules(2.0, 4, frames, 4096, 25165824)
            patches, seconds, peak = timed(lambda rules=rules: patches_of(str(path), rules))
            taken = f"at most {frames} frames taken"
            print(
                f"{taken:<27} {seconds:8.2f} s  {count / seconds:8.0f} frames of the clip a second, peak "
                f"{peak / 1e6:.0f} MB of which patches {patches.numel() / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
