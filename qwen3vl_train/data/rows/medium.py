"""One image or clip of a row, however it is written -> a checked `ImagePart` or `VideoPart`."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.media.clips import MAX_FPS, MIN_FPS
from qwen3vl_train.data.media.paths import ImageInput
from qwen3vl_train.data.rows.keys import Keys
from qwen3vl_train.data.rows.sample import NO_LIMITS, ImagePart, PixelLimits, VideoPart
from qwen3vl_train.data.rows.values import MAX_SECONDS, as_number, check_text, is_empty, shown, wrong_type

_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_MAX_WHOLE = 1 << 31
"""Of pixels and frames that a row asks for: above every limit that applies to them anyway."""
_RATES = ("fps", "sample_fps", "timestamps")
_CLIP_OPTIONS = (*_RATES, "nframes", "num_frames", "video_start", "video_end", "start", "end")
OPTIONS = {"text": (), "image": _LIMITS, "video": (*_LIMITS, *_CLIP_OPTIONS)}
"""What a part says about its medium, beside the medium itself."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif",
             ".mp4", ".webm", ".mkv", ".mov", ".avi")  # fmt: skip


def read_medium(
    kind: str,
    value: Any,
    options: Mapping[str, Any],
    where: str,
    ignored: list[str],
    name: str | None = None,
) -> ImagePart | VideoPart:
    """Read the medium of a part or of a row's list.

    kind: "image" or "video".
    options: what the part says about it beside the medium itself: limits, times, rates.
    name: the key that the part has it under, for messages; None: its kind.
    Raise RowFault.
    """
    if kind == "image":
        limits = _limits(options, where)
        return ImagePart(_image(value, f"{where}.{name or kind}", ignored), limits)
    return _video(value, dict(options), where, ignored)


def is_medium(value: Any) -> bool:
    """Return whether a value can only be a picture or a clip: an image, its bytes, or the path of its file."""
    if isinstance(value, dict):
        return value.keys() <= {"bytes", "path"} and not is_empty(value)
    if isinstance(value, str):
        return len(value) < 1024 and value.lower().endswith(_SUFFIXES) and not any(map(str.isspace, value))
    return isinstance(value, bytes | Image.Image)


def is_picture_path(value: Any) -> bool:
    """Return whether a value is the path of a picture, by its extension."""
    return isinstance(value, str) and value.lower().endswith(_SUFFIXES[:10])


def _image(value: Any, where: str, ignored: list[str]) -> ImageInput:
    value = _source(value, "image", where, ignored)
    if isinstance(value, str):
        return check_text(value, where)
    if isinstance(value, bytes | Image.Image):
        return value
    raise wrong_type(where, value, "; write a path, a data URI, bytes or a PIL image")


def _source(value: Any, kind: str, where: str, ignored: list[str]) -> Any:
    """Return the path, the bytes or the data URI of a struct around a medium; anything else as it is.

    {"bytes": ..., "path": ...} of typed files, {"url": ..., "detail": ...} of OpenAI, {"type": "base64", "data": ...}
    of Anthropic, {"path": ..., "width": ..., "height": ...}.
    """
    if not isinstance(value, dict):
        return value
    keys = Keys(value, where)
    keys.mark_read("type", "media_type")
    data, encoded = keys.take("bytes"), keys.take("base64", "data")
    name = keys.take("path", "url", kind, f"{kind}_url", "file_name") if data is None else keys.get("path")
    if data is None and encoded is None and name is None:
        raise RowFault(f"{where} is an object without a path, url, base64 or bytes; write one", kind="missing_field")
    if data is not None and encoded is not None:
        fault = f"{where}: bytes and base64 are both given; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    ignored += [f"part.{key}" for key in keys.unread()]
    if encoded is not None and isinstance(encoded, str) and data is None:
        return encoded if encoded.startswith("data:") else f"data:;base64,{encoded}"
    return data if data is not None else name


def _video(value: Any, options: dict[str, Any], where: str, ignored: list[str]) -> VideoPart:
    """Read a video file with its limits, or frames with exactly one of fps, sample_fps and timestamps.

    Next to a file, fps is the rate at which it is sampled, as in Qwen's own scripts; next to frames it is their rate.
    sample_fps 2 of three frames -> timestamps 0.0, 0.5, 1.0
    """
    if isinstance(value, dict):
        value, options = _unpack_clip(value, options, where, ignored)
    if not isinstance(value, str | bytes | list | tuple):
        raise wrong_type(f"{where}.video", value, "; write a path, a data URI, bytes or a list of frames")
    limits, segment = _limits(options, where), _segment(options, where)
    rates = {name: options[name] for name in _RATES if name in options}
    if isinstance(value, str | bytes):
        return _video_file(value, options, rates, where, {"limits": limits, **segment})
    frames = tuple(_image(frame, f"{where}.video[{index}]", ignored) for index, frame in enumerate(value))
    if len(frames) < 2:
        raise RowFault(f"{where}.video: {len(frames)} frames, a clip needs 2; add frames or give an image")
    if len(rates) != 1:
        raise RowFault(
            f"{where}: a list of frames with {' and '.join(rates) or 'no times'}; give one of {', '.join(_RATES)}, "
            'as in {"frames": [...], "fps": 2}',
            kind="conflicting_fields" if rates else "no_frame_rate",
        )
    ((key, given),) = rates.items()
    if segment or "nframes" in options or "num_frames" in options:
        others = ", ".join(name for name in _CLIP_OPTIONS if name in options and name not in _RATES)
        fault = f"{where}: {others} next to a list of frames; list the frames that you mean"
        raise RowFault(fault, kind="conflicting_fields")
    if key == "timestamps":
        return VideoPart(frames, timestamps=_timestamps(given, len(frames), f"{where}.timestamps"), limits=limits)
    rate = _rate(given, f"{where}.{key}")
    if key == "fps":
        return VideoPart(frames, fps=rate, limits=limits)
    return VideoPart(frames, timestamps=tuple(index / rate for index in range(len(frames))), limits=limits)


def _video_file(
    value: str | bytes, options: Mapping[str, Any], rates: Mapping[str, Any], where: str, more: dict[str, Any]
) -> VideoPart:
    if isinstance(value, str):
        check_text(value, f"{where}.video")
    if "timestamps" in rates:
        fault = f"{where}: timestamps next to a video file, whose header has the times; remove it"
        raise RowFault(fault, kind="conflicting_fields")
    counts = [name for name in ("nframes", "num_frames") if name in options]
    if len(counts) + len(rates) > 1:
        fault = f"{where}: {' and '.join([*rates, *counts])} are both given; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    if counts:
        more["num_frames"] = _whole(options[counts[0]], f"{where}.{counts[0]}", least=2)
    elif "fps" in rates:
        more["target_fps"] = _rate(rates["fps"], f"{where}.fps")
    elif "sample_fps" in rates:
        more["sample_fps"] = _rate(rates["sample_fps"], f"{where}.sample_fps")
    return VideoPart(value, **more)


def _unpack_clip(
    clip: dict[str, Any], options: dict[str, Any], where: str, ignored: list[str]
) -> tuple[Any, dict[str, Any]]:
    """Return the frames or the file of an object such as {"frames": [...], "fps": 2}, and all options of the clip."""
    keys = Keys(clip, f"{where}.video")
    inner = {name: found for name in OPTIONS["video"] if (found := keys.take(name)) is not None}
    both = sorted(inner.keys() & options.keys())
    if both:
        fault = f"{where}: {', '.join(both)} both in the video and next to it; keep one of them"
        raise RowFault(fault, kind="conflicting_fields")
    options = inner | options
    if "frames" not in clip:
        return _source(
            {key: clip[key] for key in clip if key not in inner}, "video", f"{where}.video", ignored
        ), options
    frames = keys.get("frames")
    if not isinstance(frames, list | tuple) or is_empty(frames):
        raise wrong_type(f"{where}.video.frames", frames, ", not a list; write a list of images")
    ignored += [f"part.{key}" for key in keys.unread()]
    return frames, options


def _limits(options: Mapping[str, Any], where: str) -> PixelLimits:
    given = {name: _whole(options[name], f"{where}.{name}") for name in _LIMITS if name in options}
    if not given:
        return NO_LIMITS
    height, width = given.get("resized_height"), given.get("resized_width")
    if (height is None) != (width is None):
        fault = f"{where}: one of resized_height and resized_width alone; give both or neither"
        raise RowFault(fault, kind="missing_field")
    least, most = given.get("min_pixels"), given.get("max_pixels")
    if least is not None and most is not None and least > most:
        raise RowFault(f"{where}: min_pixels {least} is more than max_pixels {most}; lower it")
    return PixelLimits(least, most, height, width)


def _segment(options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Return start and end of a clip in seconds, as far as they are given."""
    segment = {}
    for bound in ("start", "end"):
        names = [name for name in (bound, f"video_{bound}") if name in options]
        if len(names) == 2:
            fault = f"{where}: {' and '.join(names)} are both given; keep one of them"
            raise RowFault(fault, kind="conflicting_fields")
        if names:
            seconds = as_number(options[names[0]])
            if seconds is None or not 0 <= seconds <= MAX_SECONDS:
                what = f"write seconds, from 0 to {MAX_SECONDS:,.0f}"
                raise RowFault(f"{where}.{names[0]} is {shown(options[names[0]])}; {what}")
            segment[bound] = seconds
    if len(segment) == 2 and segment["start"] >= segment["end"]:
        raise RowFault(f"{where}: starts at {segment['start']:g} s and ends at {segment['end']:g} s; write a later end")
    return segment


def _whole(value: Any, where: str, least: int = 1) -> int:
    number = as_number(value)
    if number is None or number != int(number) or not least <= number <= _MAX_WHOLE:
        raise RowFault(f"{where} is {shown(value)}; write a whole number from {least} to {_MAX_WHOLE:,}")
    return int(number)


def _rate(value: Any, where: str) -> float:
    number = as_number(value)
    if number is None or not MIN_FPS <= number <= MAX_FPS:
        fault = f"{where} is {shown(value)}; write a number of frames per second, from {MIN_FPS:g} to {MAX_FPS}"
        raise RowFault(fault, kind="no_frame_rate")
    return number


def _timestamps(times: Any, num_frames: int, where: str) -> tuple[float, ...]:
    if not isinstance(times, list | tuple):
        raise wrong_type(where, times, "; write a list of seconds, one for each frame")
    if len(times) != num_frames:
        raise RowFault(f"{where}: {len(times)} times for {num_frames} frames; give one for each frame")
    last = 0.0
    for index, time in enumerate(times):
        seconds = as_number(time)
        if seconds is None or not last <= seconds <= MAX_SECONDS:
            what = f"write seconds, from 0 to {MAX_SECONDS:,.0f}, that never decrease"
            raise RowFault(f"{where}[{index}] is {shown(time)}; {what}")
        last = seconds
    return tuple(map(float, times))
