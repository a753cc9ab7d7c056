"""Decode chosen frames of a video file with PyAV. Never holds more than a few frames at a time."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.frame_times import Packet, list_packets, wrong_frame_count
from qwen3vl_train.data.media.paths import VideoInput, describe, path_or_bytes
from qwen3vl_train.data.media.rotation import IDENTITY
from qwen3vl_train.data.media.video import VideoHeader, open_video, rotation_of

_TIMED_CONTAINERS = ("mov", "matroska")
"""Containers whose packets carry the time at which their frame is shown. AVI's carry a decoding order, and those of
broadcast streams may wrap or start in the middle; these are decoded from the beginning."""


def read_frames(
    source: VideoInput, indices: Sequence[int], header: VideoHeader, media_root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Decode the frames of these indices: yield (index, uint8 (3, H, W)), in any order, a channels-last view.

    Only the groups of pictures that hold a wanted frame are decoded, where packets carry times; a frame may then come
    a second time, when a decoder withholds one and everything is decoded again from the beginning. The number of frames
    is checked against the header. The pixels are those of PyAV's `to_ndarray(format="rgb24")`, rotated upright. Raise
    MediaFault.
    """
    name, file = describe(source, "video"), path_or_bytes(source, media_root, "video")
    wanted, convert = set(indices), _Converter(name, header)
    with open_video(file, name) as (container, stream):
        timed = container.format.name.startswith(_TIMED_CONTAINERS)
        packets, _ = list_packets(container, stream)
    if timed and (times := _presentation_times(packets)) is not None:
        if len(times) != header.num_frames:
            raise wrong_frame_count(name, header.num_frames, len(times))
        found = set()
        for index, rgb in _decode_groups(file, packets, {times[index]: index for index in wanted}, convert):
            found.add(index)
            yield index, rgb
        if found == wanted:
            return
    yield from _decode_all(file, wanted, convert)


def _presentation_times(packets: Sequence[Packet]) -> list[int] | None:
    """Return the times of the shown frames, ascending; None if times are missing or repeated, or no frame is a key."""
    times = sorted(packet.time for packet in packets if packet.time is not None and not packet.discarded)
    complete = all(packet.time is not None for packet in packets) and len(set(times)) == len(times)
    return times if complete and packets and packets[0].is_key else None


def _needed_packets(packets: Sequence[Packet], times: set[int]) -> list[bool]:
    """Return for every packet whether to decode it: from the key frame before a wanted frame through that frame.

    The key frame may be shown after a frame that follows it in decoding order (an open group); that one needs the key
    frame before.
    """
    needed = [False] * len(packets)
    keys: list[tuple[int, int]] = []
    for index, packet in enumerate(packets):
        if packet.is_key:
            keys.append((index, packet.time or 0))
        if packet.time in times:
            start = next((key for key, time in reversed(keys) if time <= packet.time), 0)
            needed[start : index + 1] = [True] * (index + 1 - start)
    return needed


def _decode_groups(
    file: str | bytes, packets: Sequence[Packet], index_at: dict[int, int], convert: "_Converter"
) -> Iterator[tuple[int, Tensor]]:
    """Feed the decoder only the packets it needs. May miss frames; never yields a wrong one.

    index_at: time -> frame index.
    """
    needed = iter(_needed_packets(packets, set(index_at)))
    with open_video(file, convert.name) as (container, stream):
        context, fed = stream.codec_context, False
        for packet in container.demux(stream):
            if packet.size and next(needed, False):
                # Frames that no other frame refers to need not be decoded unless they are wanted.
                context.skip_frame = "DEFAULT" if packet.pts in index_at else "NONREF"
                frames, fed = context.decode(packet), True
            elif fed:
                frames, fed = context.decode(None), False
                context.flush_buffers()
            else:
                continue
            for frame in frames:
                if frame.pts in index_at:
                    yield index_at[frame.pts], convert(frame)


def _decode_all(file: str | bytes, wanted: set[int], convert: "_Converter") -> Iterator[tuple[int, Tensor]]:
    """Decode from the beginning to the end and count; the index of a frame is its position in what is shown."""
    count = 0
    with open_video(file, convert.name) as (container, stream):
        for frame in container.decode(stream):
            if count in wanted:
                yield count, convert(frame)
            count += 1
    if count != convert.header.num_frames:
        raise wrong_frame_count(convert.name, convert.header.num_frames, count)


class _Converter:
    """Turn decoded frames into upright RGB, and check them against the header. One scaler serves all frames."""

    def __init__(self, name: str, header: VideoHeader) -> None:
        from av.video.reformatter import VideoReformatter

        self.name, self.header, self.scaler = name, header, VideoReformatter()

    def __call__(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise MediaFault(f"{self.name}: the frame at {frame.time or 0:.2f} seconds is damaged; replace the file")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        numbers = IDENTITY if matrix is None else tuple(memoryview(bytes(matrix)).cast("i"))
        rotation = rotation_of(numbers, self.name)
        if rotation != self.header.rotation:
            fault = f"its frames are rotated by {90 * rotation} degrees, its header says {90 * self.header.rotation}"
            raise MediaFault(f"{self.name}: {fault}; write it again upright, or as MP4")
        rgb_HWC = torch.from_numpy(self.scaler.reformat(frame, format="rgb24", threads=1).to_ndarray())
        upright = torch.rot90(rgb_HWC, rotation) if rotation else rgb_HWC  # rot90 by 0 would copy
        if upright.shape[:2] != (self.header.height, self.header.width):
            height, width, _ = upright.shape
            fault = f"a frame is {width}x{height}, the header says {self.header.width}x{self.header.height}"
            raise MediaFault(f"{self.name}: {fault}; write it again in one size")
        return upright.permute(2, 0, 1)
