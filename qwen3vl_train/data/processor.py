"""The image settings of a checkpoint, read from its preprocessor files and held against what this code does."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.media import FACTOR, MERGE, PATCH


class ImageLimits(NamedTuple):
    """Area of an image after resizing, in pixels; one visual token is 32x32 of them."""

    min_pixels: int
    max_pixels: int


def read_image_limits(model_path: str | Path, arch: Qwen3VLArch) -> ImageLimits:
    """Read processor_config.json (transformers 5) or preprocessor_config.json. Raises ValueError.

    Everything that shapes pixels is checked, since the class defaults of transformers are not Qwen3-VL's: a missing
    patch size or mean would silently mean another one there.
    """
    settings, where = _image_settings(Path(model_path))
    vision = arch.vision
    wanted = {
        "patch_size": (PATCH, vision.patch_size),
        "merge_size": (MERGE, vision.spatial_merge_size),
        "temporal_patch_size": (2, vision.temporal_patch_size),
    }
    faults = []
    for key, (value, of_model) in wanted.items():
        if settings.get(key) != value or of_model != value:
            faults.append(f"{key} is {settings.get(key)} here and {of_model} in config.json, Qwen3-VL has {value}")
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
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        least = most = 0
        faults.append(f"size is {settings.get('size')}, not {{'shortest_edge': pixels, 'longest_edge': more pixels}}")
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}; use the preprocessor file of this checkpoint")
    return ImageLimits(least, most)


def _image_settings(folder: Path) -> tuple[dict[str, Any], str]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error}); copy the file again") from None
        if name == "processor_config.json":
            settings = settings.get("image_processor") if isinstance(settings, dict) else None
        if isinstance(settings, dict):
            return settings, str(file)
    raise ValueError(f"{folder}: no preprocessor_config.json or processor_config.json; copy it from the checkpoint")


def budget(limits: ImageLimits, min_visual_tokens: int | None, max_visual_tokens: int | None) -> ImageLimits:
    """Put a budget in visual tokens an image in the place of the checkpoint's limits.

    A maximum below the checkpoint's minimum (or the other way round) takes that along. Raises ValueError.
    """
    for name, tokens in (("min", min_visual_tokens), ("max", max_visual_tokens)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"data.{name}_visual_tokens_per_image: got {tokens}; use at least 1")
    if min_visual_tokens is not None and max_visual_tokens is not None and min_visual_tokens > max_visual_tokens:
        raise ValueError(
            f"data.min_visual_tokens_per_image: got {min_visual_tokens}, more than the maximum of {max_visual_tokens}; "
            "lower it"
        )
    least, most = limits
    if max_visual_tokens is not None:
        most = max_visual_tokens * FACTOR**2
        least = min(least, most)
    if min_visual_tokens is not None:
        least = min_visual_tokens * FACTOR**2
        most = max(least, most)
    return ImageLimits(least, most)
