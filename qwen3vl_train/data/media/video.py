"""Open video files and read their headers with PyAV (extra `video`). `frames.py` decodes them.

Only containers that cannot refer to other files are opened.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.clips import MAX_FPS, MIN_FPS
from qwen3vl_train.data.media.frame_times import Frames, check_num_frames, list_frames
from qwen3vl_train.data.media.mp4_boxes import mp4_num_frames
from qwen3vl_train.data.media.paths import VideoInput, check_area, describe, path_or_bytes, unreadable
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
    """What a file declares about its first video stream. height, width: as shown, after a phone's rotation.

    times: seconds of every frame, from the first one, where the declared rate is not theirs; fps is then their mean
        rate. None: frame i is shown at i / fps.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    rotation: int  # quarter turns counter-clockwise (0..3)
    times: tuple[float, ...] | None = None

    @property
    def uneven(self) -> bool:
        """Whether the file's rate does not say when its frames are shown: its times are used in place of it."""
        return self.times is not None


def read_header(
    source: VideoInput, media_root: str | os.PathLike[str] | None = None, max_pixels: int | None = None
) -> VideoHeader:
    """Read frame count, frame rate and size without decoding. Raise MediaFault; ValueError where PyAV is missing.

    Takes 1 to 13 ms, most of it FFmpeg's own probe of the first frame. The rate is the average one, as in transformers,
    unless the frames' own times differ from it, see `Frames.uneven_times`. Where the container has no table of frames
    (Matroska, WebM, MPEG-TS, fragmented MP4) or its table disagrees with its own count, the packets of the stream are
    listed, which reads the whole file. Where the first frames may need others that the file does not have, the first
    one is decoded. Larger frames than max_pixels are a fault; None: than Pillow's limit for images.
    """
    name, file = describe(source, "video"), path_or_bytes(source, media_root, "video")
    with contextlib.suppress(OSError), BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        check_num_frames(mp4_num_frames(opened), name)  # before FFmpeg makes a table of them
    with open_video(file, name) as (container, stream):
        frames = list_frames(file, container, stream, name)
        fps, times = _rate(frames, float(stream.average_rate or 0), name)
        height, width = stream.codec_context.height, stream.codec_context.width
        if height < 1 or width < 1:
            raise MediaFault(f"{name}: {width}x{height} has no pixels; replace it")
        check_area(name, height, width, max_pixels, "pixels a frame")
        rotation = _header_rotation(file, container, stream, name)
    if frames.num_frames < 2:
        found = "no frames" if not frames.num_frames else "1 frame"
        raise MediaFault(f"{name}: has {found}, a clip needs 2; replace it, or give the frame as an image")
    if not frames.begins_with_key:
        _check_beginning(file, name)
    if rotation % 2:
        height, width = width, height
    return VideoHeader(frames.num_frames, fps, height, width, rotation, times)


def _rate(frames: Frames, declared: float, name: str) -> tuple[float, tuple[float, ...] | None]:
    """Return the declared rate, or the mean one and all times where they are not those of the declared rate."""
    valid = MIN_FPS <= declared <= MAX_FPS
    times = frames.uneven_times(declared if valid else None)
    if times is None and valid:
        return declared, None
    span = 0.0 if times is None else times[-1]
    fps = (frames.num_frames - 1) / span if span > 0 else declared
    if times is None or not MIN_FPS <= fps <= MAX_FPS:
        found = "missing" if not fps else f"{fps:g}"
        fault = f"frame rate is {found}, not from {MIN_FPS:g} to {MAX_FPS}; write the file again with its rate"
        raise MediaFault(f"{name}: {fault}", kind="no_frame_rate")
    return fps, times


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


def _check_beginning(file: str | bytes, name: str) -> None:
    """Decode the first frame. Raise MediaFault where it is not the first of those that the file lists as shown."""
    listed: list[int] = []
    with open_video(file, name) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                listed.append(packet.pts)
            frame = next(iter(stream.codec_context.decode(packet)), None)
            if frame is not None:
                break
        else:
            raise MediaFault(f"{name}: none of its frames can be decoded; write it again")
    missing = 0 if frame.pts is None else sum(time < frame.pts for time in listed)
    if missing:
        fault = f"its first {missing} frames cannot be decoded, as it was cut between two key frames"
        raise MediaFault(f"{name}: {fault}; write it again (ffmpeg -i OLD NEW.mp4)")
