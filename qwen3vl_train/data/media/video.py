"""Open video files and read their headers with PyAV (extra `video`). `frames.py` decodes them.

Only containers that cannot refer to other files are opened.
"""

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.clips import MAX_FPS
from qwen3vl_train.data.media.paths import VideoInput, describe, path_or_bytes, too_large, unreadable
from qwen3vl_train.data.media.rotation import Matrix, mp4_matrix, rotation_from_matrix

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""FFmpeg's names. Not included are playlists and image sequences, which open other files or URLs, and bare streams,
whose frame rate is invented."""

_SYSTEM_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
"""Errors of the machine and not of a file's content, though FFmpeg occasionally gives EIO for content too."""


class VideoHeader(NamedTuple):
    """What a file declares about its first video stream. height, width: as shown, after a phone's rotation."""

    num_frames: int
    fps: float
    height: int
    width: int
    rotation: int  # quarter turns counter-clockwise (0..3)


class Packet(NamedTuple):
    """One coded frame, in decoding order. time: when it is shown, in the stream's units, or None."""

    time: int | None
    is_key: bool
    discarded: bool


def read_header(source: VideoInput, media_root: str | os.PathLike[str] | None = None) -> VideoHeader:
    """Read frame count, frame rate and size without decoding. Raise MediaFault; ValueError where PyAV is missing.

    Takes 1 to 13 ms, most of it FFmpeg's own probe of the first frame. The rate is the average one, as in transformers.
    Where the container has no table of frames (Matroska, WebM, MPEG-TS, fragmented MP4) or its table disagrees with its
    own count, the packets of the stream are counted, which reads the whole file.
    """
    name, file = describe(source, "video"), path_or_bytes(source, media_root, "video")
    with open_video(file, name) as (container, stream):
        fps = float(stream.average_rate or 0)
        if not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
            found = "missing" if not fps else f"{fps:g}"
            fault = f"frame rate is {found}, not above 0 and at most {MAX_FPS}; write the file again with its rate"
            raise MediaFault(f"{name}: {fault}", kind="no_frame_rate")
        height, width = stream.codec_context.height, stream.codec_context.width
        if height < 1 or width < 1:
            raise MediaFault(f"{name}: {width}x{height} has no pixels; replace it")
        if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
            raise too_large(name, f"{width}x{height}", "pixels a frame")
        rotation = _header_rotation(file, container, stream, name)
        num_frames = _count_frames(container, stream, name)
    if num_frames < 2:
        frames = "no frames" if not num_frames else "1 frame"
        raise MediaFault(f"{name}: has {frames}, a clip needs 2; replace it, or give the frame as an image")
    if rotation % 2:
        height, width = width, height
    return VideoHeader(num_frames, fps, height, width, rotation)


@contextlib.contextmanager
def open_video(file: str | bytes, name: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a file at its first real video stream; turn what PyAV raises into MediaFault."""
    try:
        import av
        from av.error import FFmpegError
        from av.format import ContainerFormat
        from av.stream import Disposition
    except ImportError as error:
        raise ValueError(f"video: PyAV is not installed ({error}); pip install 'qwen3vl_train[video]'") from None
    # The whitelist takes FFmpeg's full names; some formats have several, like "mov,mp4,m4a".
    formats = ",".join(ContainerFormat(short, "r").name for short in _CONTAINERS.split(","))
    options = {"format_whitelist": formats, "protocol_whitelist": "file"}
    source = BytesIO(file) if isinstance(file, bytes) else file
    try:
        with av.open(source, "r", options=options, metadata_errors="ignore") as container:
            # The cover art of a song is a video stream of one picture.
            streams = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
            if not streams:
                found = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                fault = f"{name}: has no video stream (streams: {found}); replace the file"
                raise MediaFault(fault, kind="unsupported_media")
            if streams[0].codec_context is None:
                fault = f"{name}: FFmpeg cannot decode its codec; write the file again as H.264"
                raise MediaFault(fault, kind="unsupported_media")
            streams[0].codec_context.thread_count = 1  # the loader runs one process per core already
            yield container, streams[0]
    except MediaFault:
        raise
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in _SYSTEM_ERRORS:
            raise unreadable(name, reason) from None
        fault = f"is truncated, damaged or of an unsupported format ({reason})"
        raise MediaFault(f"{name}: {fault}; replace it or write it as MP4") from None


def _header_rotation(file: str | bytes, container: "InputContainer", stream: "VideoStream", name: str) -> int:
    """Return the rotation that an MP4 or MOV header asks for; 0 for other containers."""
    if not container.format.name.startswith("mov"):
        return 0
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        return rotation_of(mp4_matrix(opened, stream.id), name)


def rotation_of(matrix: Matrix, name: str) -> int:
    """Return the rotation of a display matrix. Raise MediaFault for mirrored videos and other angles."""
    rotation = rotation_from_matrix(matrix)
    if rotation is None:
        fault = f"{name}: is mirrored or not rotated by a multiple of 90 degrees; write it again upright"
        raise MediaFault(fault, kind="unsupported_media")
    return rotation


def _count_frames(container: "InputContainer", stream: "VideoStream", name: str) -> int:
    """Return the number of shown frames: from the table of an unfragmented MP4, MOV or AVI, or else from the packets.

    The table also marks frames that an edit list cuts away, which `nb_frames` counts. The packets and their last time
    are compared with what the header declares, where it does.
    """
    entries = [(entry.pos + entry.size, entry.is_discard) for entry in stream.index_entries]
    if container.format.name.startswith("mov") and entries and container.size > 0:
        end = max(end for end, _ in entries)
        if end > container.size:
            fault = f"its header lists frames up to byte {end}, it has {container.size}"
            raise MediaFault(f"{name}: is truncated: {fault}; copy the file again")
    if stream.frames and stream.frames == len(entries):
        return sum(not discarded for _, discarded in entries)
    packets, seconds = list_packets(container, stream)
    num_frames = sum(not packet.discarded for packet in packets)
    if stream.frames and stream.frames != num_frames:
        raise wrong_frame_count(name, stream.frames, num_frames)
    declared = (container.duration or 0) / 1e6
    if container.format.name.startswith("matroska") and seconds < 0.95 * declared - 0.5:
        fault = f"its header declares {declared:.1f} seconds, its packets end at {seconds:.1f}"
        raise MediaFault(f"{name}: is truncated: {fault}; copy the file again")
    return num_frames


def list_packets(container: "InputContainer", stream: "VideoStream") -> tuple[list[Packet], float]:
    """Return the stream's packets in decoding order, and the second at which the last packet of any stream ends."""
    packets, end = [], 0.0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size:
            packets.append(Packet(packet.pts, packet.is_keyframe, packet.is_discard))
    return packets, end


def wrong_frame_count(name: str, declared: int, found: int) -> MediaFault:
    fault = f"its header declares {declared} frames, {found} were found"
    return MediaFault(f"{name}: {fault}; it is truncated or damaged, write it again")
