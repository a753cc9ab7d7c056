"""Video files: what their headers say, and the frames that were asked for, decoded with PyAV (extra `video`).

Nothing here holds more than a few frames at a time. Only containers that cannot point at other files are opened.
"""

import contextlib
import errno
import math
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import decode_data_uri, find_file, name_of
from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.media.rotation import IDENTITY, mp4_matrix, quarter_turns
from qwen3vl_train.data.rows.sample import MAX_FPS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VideoSource = str | bytes | Remote
"""A path, a `data:` URI, the bytes of a video file, or something to be fetched."""

_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""FFmpeg's names. Playlists, image sequences and bare streams are left out: those reach for other files or URLs, and
these have no frame rate but an invented one."""

_TIMED = ("mov", "matroska")
"""Containers whose packets carry the time at which their frame is shown. AVI's carry an order of decoding, and those
of broadcast streams may wrap or start in the middle; these are decoded from the beginning."""


_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
"""Numbers of errors that are not those of a file's content, though FFmpeg now and then gives EIO for that too."""


class VideoHeader(NamedTuple):
    """What a file says of its first video stream. height, width: as shown, after a phone's rotation."""

    num_frames: int
    fps: float
    height: int
    width: int
    turns: int


def read_header(source: VideoSource, media_root: str | os.PathLike[str] | None = None) -> VideoHeader:
    """Read frame count, frame rate and size without decoding. Raises MediaFault; ValueError where PyAV is missing.

    1 to 13 ms, most of it FFmpeg's own look at the first frame. The rate is the average one, as transformers takes it.
    Where the container has no table of frames (Matroska, WebM, MPEG-TS, fragmented MP4) or its table does not agree
    with its own count, the packets of the stream are counted, which reads the whole file.
    """
    name, file = name_of(source, "video"), _path_or_bytes(source, media_root)
    with _opened(file, name) as (container, stream):
        rate = stream.average_rate
        fps = float(rate) if rate is not None else 0.0
        if not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
            found = "missing" if not fps else f"{fps:g}"
            raise MediaFault(
                f"{name}: frame rate is {found}, not above 0 and at most {MAX_FPS}; write the file again with its rate",
                kind="no_frame_rate",
            )
        height, width = stream.codec_context.height, stream.codec_context.width
        _check_size(name, height, width)
        turns = _turns_of_header(file, container, stream, name)
        num_frames = _tabled_frames(container, stream, name)
        if num_frames is None:
            packets, end = _list_packets(container, stream)
            num_frames = sum(not packet.discarded for packet in packets)
            _check_whole(container, stream, num_frames, end, name)
    if num_frames < 2:
        frames = "no frames" if not num_frames else "1 frame"
        raise MediaFault(f"{name}: has {frames}, a clip needs 2; replace it, or give the frame as an image")
    if turns % 2:
        height, width = width, height
    return VideoHeader(num_frames, fps, height, width, turns)


def read_frames(
    source: VideoSource,
    indices: Sequence[int],
    header: VideoHeader,
    media_root: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Decode the frames of these numbers: yield (number, uint8 (3, H, W)), in any order, a channels-last view.

    Only the groups of pictures that hold a wanted frame are decoded, where packets carry times; a frame may then come
    a second time, when a decoder withholds one and all is decoded again from the beginning. The number of frames is
    held against the header's. The pixels are those of PyAV's `to_ndarray(format="rgb24")`, turned upright. Raises
    MediaFault.
    """
    name, file = name_of(source, "video"), _path_or_bytes(source, media_root)
    wanted, convert = set(indices), _Converter(name, header)
    with _opened(file, name) as (container, stream):
        timed = container.format.name.startswith(_TIMED)
        packets, _ = _list_packets(container, stream)
    if timed and (times := _shown_times(packets)) is not None:
        if len(times) != header.num_frames:
            raise _other_count(name, header.num_frames, len(times))
        numbers = {times[index]: index for index in wanted}
        found = set()
        for number, rgb in _decode_groups(file, packets, numbers, convert):
            found.add(number)
            yield number, rgb
        if found == wanted:
            return
    yield from _decode_all(file, wanted, convert)


class _Packet(NamedTuple):
    """One coded frame, in the order of decoding. time: when it is shown, in the stream's units, or None."""

    time: int | None
    is_key: bool
    discarded: bool


@contextlib.contextmanager
def _opened(file: str | bytes, name: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a file at its first real video stream; turn what PyAV raises into MediaFault."""
    try:
        import av
        from av.error import FFmpegError
        from av.stream import Disposition
    except ImportError as error:
        raise ValueError(f"video: PyAV is not there ({error}); pip install 'qwen3vl_train[video]'") from None
    allowed = {"format_whitelist": _whitelist(av), "protocol_whitelist": "file"}
    try:
        with av.open(
            BytesIO(file) if isinstance(file, bytes) else file, "r", options=allowed, metadata_errors="ignore"
        ) as container:
            # Cover art of a song is a video stream of one picture.
            streams = [
                stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
            ]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise MediaFault(
                    f"{name}: has no video stream (streams: {kinds}); replace the file", kind="unsupported_media"
                )
            if streams[0].codec_context is None:
                raise MediaFault(
                    f"{name}: its codec is not one FFmpeg decodes; write the file again as H.264",
                    kind="unsupported_media",
                )
            streams[0].codec_context.thread_count = 1  # the loader's workers are the threads
            yield container, streams[0]
    except MediaFault:
        raise
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in _OF_THE_MACHINE:
            raise MediaFault(
                f"{name}: cannot be read ({reason}); check disk and permissions", kind="read_error", transient=True
            ) from None
        raise MediaFault(
            f"{name}: is truncated, damaged or of a kind that is not read ({reason}); replace it or write it as MP4"
        ) from None


def _path_or_bytes(source: VideoSource, media_root: str | os.PathLike[str] | None) -> str | bytes:
    if isinstance(source, str) and not source.startswith("data:"):
        return find_file(source, media_root, "video")
    if isinstance(source, Remote):
        return source.fetch()
    data = decode_data_uri(source, "video") if isinstance(source, str) else source
    if not data:
        raise MediaFault(f"{name_of(source, 'video')}: is empty; give the bytes of a video file")
    return data


def _whitelist(av: Any) -> str:
    """FFmpeg compares whole names, and some formats have several, like "mov,mp4,m4a"."""
    return ",".join(av.format.ContainerFormat(name, "r").name for name in _CONTAINERS.split(","))


def _check_size(name: str, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise MediaFault(f"{name}: {width}x{height} has no pixels; replace it")
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise MediaFault(
            f"{name}: {width}x{height} is more than {Image.MAX_IMAGE_PIXELS} pixels a frame, Pillow's limit against "
            "decompression bombs; shrink the file",
            kind="unsupported_media",
        )


def _turns_of_header(file: str | bytes, container: "InputContainer", stream: "VideoStream", name: str) -> int:
    """Quarter turns counter-clockwise that an MP4 or MOV header asks for; 0 for other containers."""
    if not container.format.name.startswith("mov"):
        return 0
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        turns = quarter_turns(mp4_matrix(opened, stream.id))
    if turns is None:
        raise _unturnable(name)
    return turns


def _unturnable(name: str) -> MediaFault:
    return MediaFault(
        f"{name}: is mirrored or turned by no multiple of 90 degrees; write it again upright", kind="unsupported_media"
    )


def _tabled_frames(container: "InputContainer", stream: "VideoStream", name: str) -> int | None:
    """Number of frames that are shown, from the table of an unfragmented MP4, MOV or AVI; None where there is none.

    The table also knows frames that an edit list cuts away: `nb_frames` alone counts those.
    """
    entries = [(entry.pos + entry.size, entry.is_discard) for entry in stream.index_entries]
    if container.format.name.startswith("mov") and entries and container.size > 0:
        end = max(end for end, _ in entries)
        if end > container.size:
            raise MediaFault(
                f"{name}: is cut off: its header places frames up to byte {end}, it has {container.size}; "
                "copy the file again"
            )
    if not stream.frames or stream.frames != len(entries):
        return None
    return sum(not discarded for _, discarded in entries)


def _list_packets(container: "InputContainer", stream: "VideoStream") -> tuple[list[_Packet], float]:
    """Packets of the stream in decoding order, and the second at which the last packet of any stream ends."""
    packets, end = [], 0.0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size:
            packets.append(_Packet(packet.pts, packet.is_keyframe, packet.is_discard))
    return packets, end


def _check_whole(container: "InputContainer", stream: "VideoStream", counted: int, end: float, name: str) -> None:
    """Hold what was counted against what the header promises, where it promises something."""
    if stream.frames and stream.frames != counted:
        raise _other_count(name, stream.frames, counted)
    promised = (container.duration or 0) / 1e6
    if container.format.name.startswith("matroska") and end < 0.95 * promised - 0.5:
        raise MediaFault(
            f"{name}: is cut off: its header promises {promised:.1f} seconds, its packets end at {end:.1f}; "
            "copy the file again"
        )


def _other_count(name: str, promised: int, found: int) -> MediaFault:
    return MediaFault(
        f"{name}: its header promises {promised} frames, {found} are there; it is cut off or damaged, write it again"
    )


def _shown_times(packets: Sequence[_Packet]) -> list[int] | None:
    """Times of the frames in the order they are shown; None where times are missing, doubled, or no frame is a key."""
    times = sorted(packet.time for packet in packets if packet.time is not None and not packet.discarded)
    whole = all(packet.time is not None for packet in packets) and len(set(times)) == len(times)
    return times if whole and packets and packets[0].is_key else None


def _needed(packets: Sequence[_Packet], times: set[int]) -> list[bool]:
    """Say for every packet whether it must be decoded: from the key frame before a wanted frame through that frame.

    The key frame may be shown after a frame that follows it in decoding order (an open group); that one needs the key
    frame before.
    """
    needed = [False] * len(packets)
    keys: list[tuple[int, int]] = []
    for place, packet in enumerate(packets):
        if packet.is_key:
            keys.append((place, packet.time or 0))
        if packet.time in times:
            start = next((at for at, shown in reversed(keys) if shown <= packet.time), 0)
            at = place
            while at >= start and not needed[at]:
                needed[at] = True
                at -= 1
    return needed


def _decode_groups(
    file: str | bytes, packets: Sequence[_Packet], numbers: dict[int, int], convert: "_Converter"
) -> Iterator[tuple[int, Tensor]]:
    """Feed the decoder only the packets it needs. numbers: time -> frame number. May miss frames; never a wrong one."""
    needed = _needed(packets, set(numbers))
    with _opened(file, convert.name) as (container, stream):
        context, fed = stream.codec_context, False
        place = -1
        for packet in container.demux(stream):
            if packet.size:
                place += 1
            last = packet.size == 0
            if not last and place < len(packets) and needed[place]:
                # Frames that no other frame is made from need not be decoded unless they are wanted.
                context.skip_frame = "DEFAULT" if packet.pts in numbers else "NONREF"
                frames, fed = context.decode(packet), True
            elif fed:
                frames, fed = context.decode(None), False
                context.flush_buffers()
            else:
                continue
            for frame in frames:
                if frame.pts in numbers:
                    yield numbers[frame.pts], convert(frame)


def _decode_all(file: str | bytes, wanted: set[int], convert: "_Converter") -> Iterator[tuple[int, Tensor]]:
    """Decode from the beginning to the end and count; the number of a frame is its place in what is shown."""
    count = 0
    with _opened(file, convert.name) as (container, stream):
        for frame in container.decode(stream):
            if count in wanted:
                yield count, convert(frame)
            count += 1
    if count != convert.header.num_frames:
        raise _other_count(convert.name, convert.header.num_frames, count)


class _Converter:
    """Turns decoded frames into upright RGB, and checks them against the header. One scaler for all frames."""

    def __init__(self, name: str, header: VideoHeader) -> None:
        from av.video.reformatter import VideoReformatter

        self.name, self.header, self.scaler = name, header, VideoReformatter()

    def __call__(self, frame: Any) -> Tensor:
        if frame.is_corrupt:
            raise MediaFault(f"{self.name}: the frame at {frame.time or 0:.2f} seconds is damaged; replace the file")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        turns = quarter_turns(IDENTITY if matrix is None else tuple(memoryview(bytes(matrix)).cast("i")))
        if turns is None:
            raise _unturnable(self.name)
        if turns != self.header.turns:
            raise MediaFault(
                f"{self.name}: its frames are turned by {90 * turns} degrees, its header says "
                f"{90 * self.header.turns}; write it again upright, or as MP4"
            )
        rgb_HWC = torch.from_numpy(self.scaler.reformat(frame, format="rgb24", threads=1).to_ndarray())
        upright = torch.rot90(rgb_HWC, turns) if turns else rgb_HWC  # rot90 by nothing still copies
        if upright.shape[:2] != (self.header.height, self.header.width):
            found, said = upright.shape, self.header
            raise MediaFault(
                f"{self.name}: a frame is {found[1]}x{found[0]}, the header says {said.width}x{said.height}; write it "
                "again in one size"
            )
        return upright.permute(2, 0, 1)
