"""Numbers of a step: how tallies become the row of metrics.jsonl, and how that file is written and read."""

import json
import math
import re
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen3vl_train.tracking.loss_by_source import SourceLoss

# Dense bf16 tensor throughput in FLOP/s by words of the device's name; the first line that fits decides.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA40\b", 150e12),
    (r"\bA30\b", 165e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b(?! (?:D|Laptop))", 165e12),
    (r"\bRTX 3090\b(?! Ti)", 71e12),
    (r"\bMI300X\b", 1307e12),
)


@dataclass(frozen=True)
class StepTally:
    """What one optimizer step added up, over all ranks and packs, except where said otherwise.

    loss: sum of label losses / num_labels. capacity: packs x data.max_tokens_per_pack.
    flops: useful FLOPs of the step, None where not counted. seconds: wall time of the whole step;
    data_wait_seconds: the part of it in which this rank waited for packs. rejected: rows refused since the run began,
    dropped: rows left out since then by data.too_long. shrunk: media of this step that a budget made smaller.
    checkpoint_stall_seconds: how long the step before this one was held up by its checkpoint. rank_balance: planned
    work of the busiest rank / mean of all. sources: loss and label tokens of each data set.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    label_tokens: int
    visual_tokens: int
    patches: int
    capacity: int
    flops: float | None
    seconds: float
    data_wait_seconds: float
    rejected: int
    dropped: int
    shrunk: int
    checkpoint_stall_seconds: float = 0.0
    rank_balance: float = 1.0
    sources: dict[str, SourceLoss] = field(default_factory=dict)


def step_metrics(
    tally: StepTally, *, world_size: int, peak_flops: float | None, peak_memory_gib: float
) -> dict[str, Any]:
    """Turn a tally into one row of metrics.jsonl.

    peak_flops: of one device, see `bf16_peak_flops`; mfu is null without it, and always against the dense bf16 peak.
    peak_memory_gib: see `peak_memory_gib`. tokens_per_second counts all ranks. A run has at most one row a step.
    """
    seconds = max(tally.seconds, 1e-9)
    mfu = None
    if tally.flops is not None and peak_flops is not None:
        mfu = tally.flops / (seconds * peak_flops * world_size)
    return {
        "step": tally.step,
        "epoch": tally.epoch,
        "loss": tally.loss,
        "grad_norm": tally.grad_norm,
        "lr": tally.lr,
        "tokens": tally.tokens,
        "label_tokens": tally.label_tokens,
        "visual_tokens": tally.visual_tokens,
        "patches": tally.patches,
        "tokens_per_second": tally.tokens / seconds,
        "pack_efficiency": tally.tokens / max(tally.capacity, 1),
        "rank_balance": tally.rank_balance,
        "data_wait_fraction": tally.data_wait_seconds / seconds,
        "mfu": mfu,
        "peak_memory_gib": peak_memory_gib,
        "seconds": tally.seconds,
        "rejected": tally.rejected,
        "dropped": tally.dropped,
        "shrunk": tally.shrunk,
        "checkpoint_stall_seconds": tally.checkpoint_stall_seconds,
        "sources": {name: of_source._asdict() for name, of_source in tally.sources.items()},
    }


def bf16_peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (`torch.cuda.get_device_name()`), None where it is not known."""
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, device_name)), None)


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None for the CPU and for devices that are not in the table."""
    return bf16_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: by torch on a CUDA device, else by this process (without its workers)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: Linux lets a process begin with the peak of the one that started it.
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak is not None
        return int(peak.group(1)) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """Appends one JSON object a line, flushed at once, so that a kill loses at most the line being written.

    NaN and infinity, which JSON does not have, are written as null. A line that a kill cut short is taken off when the
    file is opened again; rows of steps that are done again after a resume are appended, and `read_metrics` takes those.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Raises OSError (full disk) as the system reports it."""
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mend_last_line(path: Path) -> None:
    """End a last line without a newline: keep it where it is whole JSON, cut it off where it is half a row."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        if _row(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows in the order of their steps; where a step was done again, its last row.

    A half-written last line is left out. Raises ValueError with file and line for any other line that is not a row.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None and isinstance(row.get("step"), int):
            rows[row["step"]] = row
        elif line.strip() and number < len(lines):
            raise ValueError(f"{path}:{number}: not a JSON object with a step; remove the line")
    return [rows[step] for step in sorted(rows)]
