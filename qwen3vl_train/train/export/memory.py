"""How much of a model the free memory of this machine holds."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration

_FLOAT32_BYTES = 4
# Beside the weights: activations and logits of the probes, transformers itself, and the pages of the mapped files.
_OVERHEAD, _BESIDE = 1.35, 2**30


@dataclass(frozen=True)
class LayersThatFit:
    """The decoder layers that can be compared. num_layers: None for all of them, 0 for none. note: for the user."""

    num_layers: int | None
    note: str | None


def layers_that_fit(model: Qwen3VLForConditionalGeneration, free_bytes: int | None = None) -> LayersThatFit:
    """Return how many decoder layers of the model fit into free memory in float32, with everything else of it.

    model: may be on the meta device. free_bytes: of this machine by default. At least the layers after which DeepStack
    features are added are wanted: with fewer the rest is not compared either.
    """
    free = available_bytes() if free_bytes is None else free_bytes
    layers = model.language_model.model.layers
    of_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(of_layers)

    def needed(num_layers: int) -> float:
        return _OVERHEAD * _FLOAT32_BYTES * (others + sum(of_layers[:num_layers])) + _BESIDE

    total, least = len(layers), max(1, len(model.arch.vision.deepstack_visual_indexes))
    if needed(total) <= free:
        return LayersThatFit(None, None)
    has = f"{free / 2**30:.1f} GiB of memory are free"
    for num_layers in range(total - 1, least - 1, -1):
        if needed(num_layers) <= free:
            need = f"all need {needed(total) / 2**30:.1f}"
            return LayersThatFit(
                num_layers, f"compared the first {num_layers} of {total} decoder layers: {has}, {need}"
            )
    need = f"{needed(least) / 2**30:.1f} are needed"
    return LayersThatFit(
        0, f"logits were not compared with transformers: {has}, {need}; export again where there is more"
    )


def available_bytes() -> int:
    """Return the memory that this process may still take: of the machine, or of its control group if that is less."""
    try:
        kibibytes = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(kibibytes[1]) * 1024 if kibibytes else 0
    except OSError:  # not Linux
        available = 0
    available = available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
        reclaimable = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return available
    if not limit.strip().isdecimal():
        return available
    return min(available, int(limit) - used + (int(reclaimable[1]) if reclaimable else 0))


def return_freed_memory() -> None:
    """Let the C library give freed memory back: glibc keeps what it got in blocks of less than 32 MiB, in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
