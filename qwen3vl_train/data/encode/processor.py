"""Read image and video settings from the preprocessor files of a checkpoint, and check that they are supported."""

from pathlib import Path
from typing import Any, NamedTuple

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.encode.tokenizer import read_json
from qwen3vl_train.data.media.clips import FRAMES_PER_PATCH, MAX_FPS, MIN_FPS, ClipRules
from qwen3vl_train.data.media.image import FACTOR, MERGE, PATCH


class ImageLimits(NamedTuple):
    """Limits on the area of a resized image, in pixels; one visual token is 32x32 of them."""

    min_pixels: int
    max_pixels: int


def read_image_limits(model_path: str | Path, arch: Qwen3VLArch) -> ImageLimits:
    """Read processor_config.json (transformers 5) or preprocessor_config.json. Raise ValueError.

    Every setting that affects pixels is checked, since the class defaults of transformers are not Qwen3-VL's: there, a
    missing patch size or mean would silently be another one.
    """
    found = _settings(Path(model_path), "image_processor", "preprocessor_config.json")
    if found is None:
        names = "preprocessor_config.json or processor_config.json"
        raise ValueError(f"{model_path}: no {names}; copy it from the checkpoint")
    settings, file = found
    faults = _pixel_faults(settings, arch)
    limits = _area_limits(settings, faults)
    if faults:
        raise ValueError(f"{file}: {'; '.join(faults)}; use the preprocessor file of this checkpoint")
    return limits


def read_clip_rules(model_path: str | Path, arch: Qwen3VLArch) -> ClipRules | None:
    """Read processor_config.json or video_preprocessor_config.json; None where there is neither. Raise ValueError.

    Sampling settings that the published files lack are those of transformers' Qwen3VLVideoProcessor: two frames per
    second, 4 to 768 of them.
    """
    found = _settings(Path(model_path), "video_processor", "video_preprocessor_config.json")
    if found is None:
        return None
    settings, file = found
    faults = _pixel_faults(settings, arch)
    if settings.get("cap_pixels_per_frame"):
        faults.append("cap_pixels_per_frame is true, Qwen3-VL was trained with the limit of the whole clip alone")
    limits = _area_limits(settings, faults)
    defaults = {"fps": 2, "min_frames": 4, "max_frames": 768}
    fps, min_frames, max_frames = (settings.get(key) or default for key, default in defaults.items())
    numbers = isinstance(fps, int | float) and isinstance(min_frames, int) and isinstance(max_frames, int)
    if not (numbers and MIN_FPS <= fps <= MAX_FPS and FRAMES_PER_PATCH <= min_frames <= max_frames):
        got = f"{fps!r}, {min_frames!r}, {max_frames!r}"
        faults.append(f"fps, min_frames, max_frames are {got}, Qwen3-VL has 2, 4, 768")
    if faults:
        raise ValueError(f"{file}: {'; '.join(faults)}; use the video preprocessor file of this checkpoint")
    return ClipRules(float(fps), min_frames, max_frames, *limits)


def _pixel_faults(settings: dict[str, Any], arch: Qwen3VLArch) -> list[str]:
    faults = []
    for key, value, model_value in (
        ("patch_size", PATCH, arch.vision.patch_size),
        ("merge_size", MERGE, arch.vision.spatial_merge_size),
        ("temporal_patch_size", FRAMES_PER_PATCH, arch.vision.temporal_patch_size),
    ):
        if settings.get(key) != value or model_value != value:
            faults.append(f"{key} is {settings.get(key)} here and {model_value} in config.json, Qwen3-VL has {value}")
    for key in ("image_mean", "image_std"):
        if settings.get(key) != [0.5, 0.5, 0.5]:
            faults.append(f"{key} is {settings.get(key)}, Qwen3-VL has [0.5, 0.5, 0.5]")
    if abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        faults.append(f"rescale_factor is {settings['rescale_factor']}, Qwen3-VL has 1/255")
    if settings.get("resample", 3) != 3:
        faults.append(f"resample is {settings['resample']}, Qwen3-VL has 3 (bicubic)")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not settings.get(key, True):
            faults.append(f"{key} is false, Qwen3-VL has true")
    return faults


def _area_limits(settings: dict[str, Any], faults: list[str]) -> ImageLimits:
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        least = most = 0
        faults.append(f"size is {settings.get('size')}, not {{'shortest_edge': pixels, 'longest_edge': more pixels}}")
    return ImageLimits(least, most)


def _settings(folder: Path, section: str, own_file: str) -> tuple[dict[str, Any], Path] | None:
    """Return the settings in their section of processor_config.json, or else in a file of their own, and that file."""
    for file in (folder / "processor_config.json", folder / own_file):
        if file.is_file():
            settings = read_json(file)
            if file.name != own_file and isinstance(settings, dict):
                settings = settings.get(section)
            if isinstance(settings, dict):
                return settings, file
    return None


def override_image_limits(limits: ImageLimits, min_tokens: int | None, max_tokens: int | None) -> ImageLimits:
    """Replace the checkpoint's limits by the recipe's, in visual tokens per image; None keeps the checkpoint's.

    A maximum below the checkpoint's minimum lowers that too, and the reverse. Raise ValueError.
    """
    field = "data.{}_visual_tokens_per_image".format
    for name, tokens in (("min", min_tokens), ("max", max_tokens)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"{field(name)}: got {tokens}; use at least 1")
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise ValueError(f"{field('min')}: got {min_tokens}, more than the maximum of {max_tokens}; lower it")
    low, high = (tokens and tokens * FACTOR**2 for tokens in (min_tokens, max_tokens))
    return ImageLimits(*_override_range(limits, low, high))


def _override_range(limits: tuple[int, int], low: int | None, high: int | None) -> tuple[int, int]:
    """Replace the limits that are given; each moves its counterpart if they would cross."""
    if high is not None:
        limits = min(limits[0], high), high
    if low is not None:
        limits = low, max(limits[1], low)
    return limits


def override_clip_rules(
    rules: ClipRules, fps: float | None, min_frames: int | None, max_frames: int | None, max_visual_tokens: int | None
) -> ClipRules:
    """Replace the checkpoint's sampling and limits by the recipe's; None keeps the checkpoint's.

    One visual token is 32x32 pixels of two frames. As in transformers, the limit is on the area of all frames: the pair
    that an odd number of frames ends with may exceed it. A limit moves its counterpart too. Raise ValueError.
    """
    if fps is not None and not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"data.fps: got {fps}; use a number from {MIN_FPS:g} to {MAX_FPS}")
    for name, value in (("min_frames", min_frames), ("max_frames", max_frames)):
        if value is not None and value < FRAMES_PER_PATCH:
            raise ValueError(f"data.{name}: got {value}; use at least {FRAMES_PER_PATCH}")
    if max_visual_tokens is not None and max_visual_tokens < 1:
        raise ValueError(f"data.max_visual_tokens_per_video: got {max_visual_tokens}; use at least 1")
    if min_frames is not None and max_frames is not None and min_frames > max_frames:
        raise ValueError(f"data.min_frames: got {min_frames}, more than data.max_frames {max_frames}; lower it")
    max_pixels = max_visual_tokens and max_visual_tokens * FRAMES_PER_PATCH * FACTOR**2
    return ClipRules(
        rules.fps if fps is None else float(fps),
        *_override_range((rules.min_frames, rules.max_frames), min_frames, max_frames),
        *_override_range((rules.min_pixels, rules.max_pixels), None, max_pixels),
    )
