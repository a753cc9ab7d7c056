"""The sizes of a checkpoint, read from its config.json in either dialect.

Published files (transformers 4.57) write rope_theta + rope_scaling; transformers 5 writes rope_parameters. Both are
read; `published_config` always writes the first, which every version loads. Class defaults of transformers are not the
checkpoints' values, so a missing number is an error, never a default.
"""

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin


@dataclass(frozen=True)
class VisionArch:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_table_side(self) -> int:
        return math.isqrt(self.num_position_embeddings)

    @property
    def merged_size(self) -> int:
        """Width of the joined row of a merge block, which the mergers read."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Width of a flattened patch: channels x temporal x height x width (1536)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextArch:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Qwen3VLArch:
    """One dense Qwen3-VL: 2B, 4B, 8B, 32B, or any other size with the same modules."""

    vision: VisionArch
    text: TextArch
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def from_pretrained(cls, model_path: str | Path) -> "Qwen3VLArch":
        """Read `model_path/config.json`. Raises ValueError that names the file and every fault found in it."""
        return cls.from_dict(read_config(model_path), where=str(Path(model_path) / "config.json"))

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = "config") -> "Qwen3VLArch":
        """Read a config in either dialect. Raises ValueError for another architecture and missing or wrong numbers."""
        model_type = config.get("model_type")
        if model_type == "qwen3_vl_moe":
            raise ValueError(
                f"{where}: model_type is qwen3_vl_moe; mixture-of-experts is not supported, use a dense one"
            )
        if model_type != "qwen3_vl":
            raise ValueError(
                f"{where}: model_type is {model_type!r}, not 'qwen3_vl'; give the folder of a Qwen3-VL checkpoint"
            )
        faults: list[str] = []
        text = _Reader(config.get("text_config"), "text_config", faults)
        vision = _Reader(config.get("vision_config"), "vision_config", faults)
        top = _Reader(config, "", faults)
        rope = text.values.get("rope_parameters") or {}
        scaling = text.values.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "mrope"):
            faults.append(f"text_config: rope_type {scaling.get('rope_type')!r} is not known; only 'default' is")
        if not scaling.get("mrope_interleaved", False):
            faults.append("text_config: mrope_interleaved is not true; Qwen3-VL interleaves its three position axes")
        for reader, key, wanted in ((text, "hidden_act", "silu"), (vision, "hidden_act", "gelu_pytorch_tanh")):
            if reader.values.get(key, wanted) != wanted:
                faults.append(f"{reader.section}.{key} is {reader.values[key]!r}; Qwen3-VL has {wanted!r}")
        if text.values.get("attention_bias"):
            faults.append("text_config.attention_bias is true; Qwen3-VL has none")
        arch = cls(
            vision=vision.read(VisionArch),
            text=text.read(
                TextArch,
                rope_theta=_Reader(rope or text.values, "text_config", faults),
                mrope_section=_Reader(scaling, "text_config.rope_scaling", faults),
            ),
            # The top level decides: files that transformers 5 saved again may carry a class default in text_config.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            image_token_id=top.value("image_token_id", int),
            video_token_id=top.value("video_token_id", int),
            vision_start_token_id=top.value("vision_start_token_id", int),
            vision_end_token_id=top.value("vision_end_token_id", int),
        )
        if not faults:
            faults += arch._contradictions()
        if faults:
            raise ValueError(f"{where}: {len(faults)} faults\n" + "\n".join(f"  - {fault}" for fault in faults))
        return arch

    def _contradictions(self) -> Iterator[str]:
        vision, text = self.vision, self.text
        section, half = text.mrope_section, text.head_dim // 2
        taps = vision.deepstack_visual_indexes
        if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
            yield "vision hidden_size / num_heads must be a multiple of 4"
        if vision.out_hidden_size != text.hidden_size:
            yield f"vision out_hidden_size {vision.out_hidden_size} is not the text hidden_size {text.hidden_size}"
        if vision.position_table_side**2 != vision.num_position_embeddings:
            yield "num_position_embeddings is not a square"
        if not all(0 <= tap < vision.depth for tap in taps):
            yield f"deepstack_visual_indexes {taps} leave the {vision.depth} vision blocks"
        if len(taps) > text.num_hidden_layers:
            yield "more DeepStack features than decoder layers"
        if text.num_attention_heads % text.num_key_value_heads:
            yield "attention heads do not divide by kv heads"
        if len(section) != 3 or sum(section) != half:
            yield f"mrope_section {section} does not sum to head_dim/2 = {half}"


_MAX_BLOCKS = 1000
_MOST = 1 << 31
_BOUNDS = {
    **dict.fromkeys(("depth", "num_hidden_layers"), (1, _MAX_BLOCKS)),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), (1, 4096)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "vocab_size", "head_dim"), (1, 10_000_000)),
    **dict.fromkeys(("in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size"), (1, 1024)),
    "num_position_embeddings": (1, 100_000_000),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, 10**15),
}
"""Least and most of the numbers of a config, far beyond any model: a damaged file asks for endless work or memory."""


def _shown(value: Any) -> str:
    text = f"an integer of {value.bit_length():,} bits" if isinstance(value, int) and value > 1 << 64 else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class _Reader:
    """Read typed numbers from one section, and collect faults instead of stopping at the first."""

    def __init__(self, values: Any, section: str, faults: list[str]) -> None:
        self.section, self.faults = section, faults
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        if not isinstance(values, dict):
            faults.append(f"{section}: missing or not an object")

    def read(self, arch: Any, **elsewhere: "_Reader") -> Any:
        """Fill a dataclass from the keys named as its fields. elsewhere: readers of fields in other sections."""
        return arch(**{one.name: elsewhere.get(one.name, self).value(one.name, one.type) for one in fields(arch)})

    def value(self, key: str, kind: Any) -> Any:
        """Return one value; a placeholder if it is a fault. kind: int, float or a type of tuples, written as lists."""
        kind = get_origin(kind) or kind
        value = self.values.get(key)
        if isinstance(value, {int: int, float: int | float, tuple: list | tuple}[kind]) and not isinstance(value, bool):
            numbers = value if isinstance(value, list | tuple) else (value,)
            least, most = _BOUNDS.get(key, (0, _MOST))
            valid = all(type(one) in (int, float) and least <= one <= most for one in numbers)
            if valid and len(numbers) <= _MAX_BLOCKS:
                return kind(value)
            what = f"{_shown(value)} is not between {least} and {most:,}; download the file again"
            self.faults.append(f"{self.section}.{key}".strip(".") + f": {what}")
            return kind() if kind is tuple else kind(1)
        if self.values:
            what = "missing" if value is None else f"{_shown(value)} is not a number of the right kind"
            self.faults.append(f"{self.section}.{key}".strip(".") + f": {what}")
        return kind() if kind is tuple else kind(1)


def read_config(model_path: str | Path) -> dict[str, Any]:
    """Read `model_path/config.json`. Raises ValueError that says what to give instead when there is none."""
    folder, file = Path(model_path), Path(model_path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: {_why_no_config(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}); download the file again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds a {type(config).__name__}, not an object")
    if (folder / "adapter_config.json").is_file():
        fault = "holds adapter_config.json beside config.json: transformers would load that adapter too, we would not"
        raise ValueError(f"{folder}: {fault}; merge it into the weights, or move it to another folder")
    return config


def _why_no_config(folder: Path) -> str:
    """Say what a path without a config.json is, and what to give instead."""
    wanted = "give a local Qwen3-VL checkpoint in Hugging Face form"
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        return f"not a folder, ~ is not expanded here; {wanted} by its whole path"
    if snapshot := re.search(r"models--(.+?)--(.+)/snapshots/([0-9a-f]+)$", str(folder)):
        owner, name, commit = snapshot.groups()
        return f"not in the cache of the Hub any more; get it again: hf download {owner}/{name} --revision {commit}"
    if not folder.exists():
        name = str(folder)
        hub = f", or get it first: hf download {name} --local-dir {name}" if name.count("/") == 1 else ""
        return f"not a folder; {wanted}{hub}"
    if folder.is_file():
        return f"a file; {wanted}, the folder that holds config.json"
    if (folder / "adapter_config.json").is_file():
        base = _base_of_adapter(folder / "adapter_config.json")
        return f"an adapter{base}; give its base as model.path, and this folder as tune.start_from to train it further"
    if (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir():
        return (
            f"the folder of a run; set tune.start_from: {folder} beside the base that it was trained on, or merge it "
            f"first (launch/export.py {folder} --merge --out merged) and give that"
        )
    return f"no config.json; {wanted}"


def _base_of_adapter(file: Path) -> str:
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return ""
    return f" of {base}" if base else ""


def without_code(settings: Any) -> Any:
    """Return settings without any `auto_map`, which asks whoever loads them to run Python files from elsewhere."""
    if not isinstance(settings, dict):
        return settings
    return {key: without_code(value) for key, value in settings.items() if key != "auto_map"}


def published_config(config: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """Return a config.json of either dialect in the published one, which transformers 4.57 and 5 both load.

    dtype: 'float32' or 'bfloat16', of the weights that it describes. Unknown keys are kept unchanged, but `auto_map`.
    """
    out = without_code(deepcopy(config))
    text, vision = out["text_config"], out["vision_config"]
    rope = text.pop("rope_parameters", None)
    if rope:
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {key: rope[key] for key in ("mrope_interleaved", "mrope_section")}
        text["rope_scaling"]["rope_type"] = rope.get("rope_type", "default")
    vision.pop("rope_parameters", None)
    vision["model_type"] = "qwen3_vl"
    text["model_type"] = "qwen3_vl_text"
    text["tie_word_embeddings"] = out["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    for section in (out, text, vision):
        section.pop("torch_dtype", None)
    vision.pop("dtype", None)
    out["dtype"] = text["dtype"] = dtype
    return out
