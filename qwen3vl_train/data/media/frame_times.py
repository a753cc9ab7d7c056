"""The frames that a video file lists, and when each is shown: from its table or its packets, without decoding."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.mp4_boxes import mp4_time_offsets

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.index import IndexEntry
    from av.video.stream import VideoStream

_WITH_TIMES = ("mov", "matroska", "flv", "gif", "mpegts", "asf", "ogg")
"""Containers that say when each frame is shown. AVI and MPEG programme streams have a rate alone."""
_MAX_SPAN_ERROR = 0.02
MAX_FRAMES = 1_000_000
"""Of a clip: nine hours at 30 a second."""
_LEADING_PACKETS = 16
"""After a key frame: those that are shown before it follow it at once."""


class Packet(NamedTuple):
    """One coded frame, in decoding order. time: when it is shown, in the stream's units, or None."""

    time: int | None
    is_key: bool
    discarded: bool
    is_cut: bool  # the file ends within it


class Frames(NamedTuple):
    """The shown frames of a stream.

    times: when each is shown, ascending, in units of `tick` seconds; None where the container does not say.
    begins_with_key: False where the first frames may need others that the file does not have.
    """

    num_frames: int
    times: Sequence[int] | np.ndarray | None
    tick: float
    begins_with_key: bool

    def uneven_times(self, rate: float | None) -> tuple[float, ...] | None:
        """Return the seconds of all frames from the first; None where they are unknown, all the same, or of the rate.

        They are those of the rate if each differs by at most half a frame, and the whole span by at most 2%; both are
        rounded to ticks. rate: None: there is none that they could agree with.
        """
        if self.times is None or not len(self.times) or self.times[0] == self.times[-1]:
            return None
        seconds = (np.asarray(self.times, dtype=np.int64) - self.times[0]) * self.tick
        if rate is not None:
            even = np.arange(len(seconds)) / rate
            is_near = np.abs(seconds - even).max() <= 0.5 / rate + self.tick
            if is_near and abs(seconds[-1] - even[-1]) <= _MAX_SPAN_ERROR * even[-1] + self.tick:
                return None
        return tuple(seconds.tolist())


def list_frames(file: str | bytes, container: "InputContainer", stream: "VideoStream", name: str) -> Frames:
    """List the shown frames: from the table of an unfragmented MP4, MOV or AVI, or else from the packets.

    The table also marks frames that an edit list cuts away, which `nb_frames` counts. The packets and their last time
    are compared with what the header declares, where it does. Raise MediaFault.
    """
    entries, container_format = list(stream.index_entries), container.format.name
    if container_format.startswith("mov") and entries and container.size > 0:
        end = max(entry.pos + entry.size for entry in entries)
        if end > container.size:
            fault = f"its header lists frames up to byte {end}, it has {container.size}"
            raise MediaFault(f"{name}: is truncated: {fault}; copy the file again")
    has_times = container_format.startswith(_WITH_TIMES)
    if stream.frames and stream.frames == len(entries):
        frames = _frames_of_table(file, stream, entries, has_times)
        if frames is not None:
            leads = _has_leading(_first_packets(container, stream, 2))
            return frames._replace(begins_with_key=entries[0].is_keyframe and not leads)
    packets, seconds = list_packets(container, stream, name)
    shown = [packet for packet in packets if not packet.discarded]
    if stream.frames and stream.frames != len(entries) and stream.frames != len(shown):
        raise wrong_frame_count(name, stream.frames, len(shown))
    declared = (container.duration or 0) / 1e6
    if container_format.startswith("matroska") and seconds < 0.95 * declared - 0.5:
        fault = f"its header declares {declared:.1f} seconds, its packets end at {seconds:.1f}"
        raise MediaFault(f"{name}: is truncated: {fault}; copy the file again")
    # Broadcast streams mark every packet after a lost one, most of which decode.
    if packets and packets[-1].is_cut and not container_format.startswith("mpegts"):
        raise MediaFault(f"{name}: is truncated: it ends within frame {len(packets):,}; copy the file again")
    times = sorted(packet.time for packet in shown if packet.time is not None) if has_times else []
    begins_with_key = not shown or (shown[0].is_key and not _has_leading(shown))
    complete = times if len(times) == len(shown) else None
    return Frames(len(shown), complete, float(stream.time_base or 0), begins_with_key)


def _frames_of_table(
    file: str | bytes, stream: "VideoStream", entries: "list[IndexEntry]", has_times: bool
) -> Frames | None:
    """Return the shown frames by the table of a file; None where only its packets say when they are shown."""
    shown = ~np.fromiter((entry.is_discard for entry in entries), bool, len(entries))
    decoded_at = np.fromiter((entry.timestamp for entry in entries), np.int64, len(entries))
    frames = Frames(int(shown.sum()), decoded_at[shown], float(stream.time_base or 0), True)
    rate = float(stream.average_rate or 0)
    if not has_times or (rate > 0 and frames.uneven_times(rate) is None):
        return frames if has_times else frames._replace(times=None)
    # Frames are decoded about when they are shown, and exactly then where none is decoded out of order.
    offsets = _time_offsets(file, stream.id, len(entries))
    return None if offsets is None else frames._replace(times=np.sort((decoded_at + offsets)[shown]))


def _time_offsets(file: str | bytes, track: int, num_frames: int) -> np.ndarray | None:
    """Return what to add to the decoding time of each frame of an MP4; None where its table does not fit."""
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        runs = mp4_time_offsets(opened, track)
    if runs is None:
        return np.zeros(num_frames, dtype=np.int64)
    counts = np.array([count for count, _ in runs], dtype=np.int64)
    if counts.sum() != num_frames:
        return None
    return np.repeat(np.array([offset for _, offset in runs], dtype=np.int64), counts)


def _has_leading(packets: Sequence[Packet]) -> bool:
    """Return whether frames that follow the first one in the file are shown before it."""
    times = [packet.time for packet in packets[: 1 + _LEADING_PACKETS] if packet.time is not None]
    return bool(times) and min(times) < times[0]


def check_num_frames(num_frames: int, name: str) -> None:
    """Raise MediaFault for a clip of more frames than any that is trained on: each of them takes memory."""
    if num_frames > MAX_FRAMES:
        fault = f"{name}: has {num_frames:,} frames, more than {MAX_FRAMES:,}; split it"
        raise MediaFault(fault, kind="unsupported_media")


def list_packets(container: "InputContainer", stream: "VideoStream", name: str = "video") -> tuple[list[Packet], float]:
    """Return the stream's packets in decoding order, and the second at which the last packet of any stream ends.

    Raise MediaFault for more than MAX_FRAMES.
    """
    packets, end = [], 0.0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size:
            packets.append(Packet(packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
            check_num_frames(len(packets), name)
    return packets, end


def _first_packets(container: "InputContainer", stream: "VideoStream", count: int) -> list[Packet]:
    """Return the first shown packets of a stream, in decoding order. They are read already: FFmpeg probed them."""
    found: list[Packet] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            found.append(Packet(packet.pts, packet.is_keyframe, False, packet.is_corrupt))
        if len(found) >= count:
            break
    return found


def wrong_frame_count(name: str, declared: int, found: int) -> MediaFault:
    fault = f"its header declares {declared} frames, {found} were found"
    return MediaFault(f"{name}: {fault}; it is truncated or damaged, write it again")
