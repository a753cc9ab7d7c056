"""Refuse weights that are not plain numbers: quantised checkpoints, and dtypes that mean nothing without scales."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_train.arch import read_config

# As safetensors names them -> as torch does.
PLAIN_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Ends of the names of tensors that a quantised weight is stored with -> what wrote them.
_QUANTISED_NAMES = {
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "awq or gptq",
    ".qzeros": "awq or gptq",
}
_REMEDY = "give the bfloat16 checkpoint that it was made from"


def check_plain_weights(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Raise ValueError for weights that are quantised, of another dtype than PLAIN_DTYPES, or plain but said not to be.

    dtypes: of every tensor in the files, by stored name, as safetensors has them.
    """
    section, method = _quantization_config(folder)
    of_names = [kind for end, kind in _QUANTISED_NAMES.items() if any(name.endswith(end) for name in dtypes)]
    others = Counter(dtype for dtype in dtypes.values() if dtype not in PLAIN_DTYPES)
    if of_names or (section and others):
        stored = f", stored as {', '.join(sorted(others))}" if others else ""
        raise ValueError(
            f"{folder}: quantised ({method or of_names[0]}{stored}), which cannot be trained here; {_REMEDY}"
        )
    plain = ", ".join(PLAIN_DTYPES.values())
    if others:
        dtype, count = others.most_common(1)[0]
        first = next(name for name, of_name in dtypes.items() if of_name == dtype)
        raise ValueError(
            f"{folder}: {count} weights are stored as {dtype}, {first} among them; only {plain} are read, {_REMEDY}"
        )
    if section:
        found = " and ".join(sorted({PLAIN_DTYPES[dtype] for dtype in dtypes.values()}))
        raise ValueError(
            f"{folder / 'config.json'}: {section} says {method}, but the weights are plain {found}; take {section} out"
        )


def _quantization_config(folder: Path) -> tuple[str, str]:
    """Return the dotted key of the quantization settings in config.json and their method, both "" without any."""
    if not (folder / "config.json").is_file():
        return "", ""
    config = read_config(folder)
    for prefix, values in (("", config), ("text_config.", config.get("text_config"))):
        settings: Any = values.get("quantization_config") if isinstance(values, dict) else None
        if settings is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            return f"{prefix}quantization_config", str(method or "quantised")
    return "", ""
