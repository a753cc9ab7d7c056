"""The numbers of a step: a tally, its row of metrics.jsonl, and how that file is written and read."""

import json
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.outputs import writing
from qwen3vl_train.tracking.loss_by_source import SourceLoss

# Dense bf16 tensor throughput in FLOP/s by words of the device's name; the first match decides.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(G?H200|H[18]00)\b", 989e12),
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
    """The sums and means of one optimizer step, over all packs of all ranks.

    grad_norms: by module group, and "all".
    """

    step: int  # counted from 1
    loss: float  # mean over all label tokens
    lr: float  # without the factors of module groups
    tokens: int
    label_tokens: int
    visual_tokens: int
    patches: int
    flops: float
    grad_norms: dict[str, float]
    sources: dict[str, SourceLoss]


class StepTimes(NamedTuple):
    """Seconds of one step on this rank."""

    step: float  # wall time of the step
    data_wait: float  # the part of it spent waiting for packs
    checkpoint_stall: float  # how long the step before this one was held up by its checkpoint


def step_metrics(
    tally: StepTally,
    packs: StepPacks,
    times: StepTimes,
    *,
    num_rejected: int,
    max_tokens_per_pack: int,
    world_size: int,
    peak_flops: float | None,
    peak_memory_gib: float,
) -> dict[str, Any]:
    """Return one row of metrics.jsonl. A run has at most one row a step.

    num_rejected: rows rejected since the run began.
    peak_flops: dense bf16 of one device; mfu is null without it.
    """
    seconds = max(times.step, 1e-9)
    return {
        "step": tally.step,
        "epoch": packs.epoch,
        "loss": tally.loss,
        "grad_norm": tally.grad_norms["all"],
        "lr": tally.lr,
        "tokens": tally.tokens,
        "label_tokens": tally.label_tokens,
        "visual_tokens": tally.visual_tokens,
        "patches": tally.patches,
        "tokens_per_second": tally.tokens / seconds,
        "pack_efficiency": tally.tokens / max(packs.num_packs * max_tokens_per_pack, 1),
        "rank_balance": packs.balance,
        "data_wait_fraction": times.data_wait / seconds,
        "mfu": None if peak_flops is None else tally.flops / (seconds * peak_flops * world_size),
        "peak_memory_gib": peak_memory_gib,
        "seconds": times.step,
        "rejected": num_rejected,
        "dropped": packs.num_dropped,
        "shrunk": packs.num_shrunk,
        "checkpoint_stall_seconds": times.checkpoint_stall,
        "sources": {name: of_source._asdict() for name, of_source in tally.sources.items()},
    }


def bf16_peak_flops(device_name: str) -> float | None:
    """Return dense bf16 FLOP/s by device name, None where it is not known."""
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, device_name)), None)


def device_peak_flops(device: torch.device) -> float | None:
    """Return dense bf16 FLOP/s of a device; None for the CPU and for devices that are not in the table."""
    return bf16_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Return peak memory in GiB: of torch on a CUDA device, else of this process (without its workers)."""
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
    """Append one JSON object a line, flushed at once, so that a kill loses at most the line being written.

    NaN and infinity, which JSON lacks, are written as null. A line that a kill cut short is removed when the file is
    opened again. Rows of steps that are done again after a resume are appended, and `read_metrics` takes those.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair_last_line(self.path)
            self._file = self.path.open("ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Raises OutputError (full disk), after which nothing more is written."""
        line = json.dumps(_finite(row), allow_nan=False).encode() + b"\n"
        with writing(self.path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _repair_last_line(path: Path) -> None:
    """End a last line that has no newline: keep it where it is valid JSON, remove it otherwise."""
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
    """Return the rows in the order of their steps; where a step was done again, its last row.

    A half-written last line is skipped. Raises ValueError with file and line for any other line that is not a row.
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
