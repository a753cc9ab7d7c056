"""What the terminal shows: the start banner, the progress of indexing, the progress of training."""

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.config.yaml12 import format_value
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.public_names import public_text

# Least time between two lines of progress in a log.
LOG_SECONDS = 5.0
_INDEX_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class GroupReport:
    """One module group: its size, how much of it trains, and at which peak rate (0 where nothing does)."""

    group: str
    num_tensors: int
    num_parameters: int
    num_trained_tensors: int
    num_trained_parameters: int
    lr: float


def start_banner(
    recipe: Recipe, ranks: Ranks, folder: Path, data_lines: Sequence[str], groups: Sequence[GroupReport]
) -> list[str]:
    """Return the lines a run prints before its first step: the run, its data, and a table of module groups."""
    trained = sum(report.num_trained_parameters for report in groups)
    total = sum(report.num_parameters for report in groups)
    method = recipe.tune.method
    if isinstance(recipe.tune, LoraTune):
        method = f"LoRA rank {format_value(recipe.tune.rank)}"
        method += f", B at {recipe.optim.lora_b_lr:.2e}" if recipe.optim.lora_b_lr else ""
    lines = [
        f"run {folder}: {recipe.model.path} in {recipe.model.dtype}, {method}, "
        f"{ranks.world_size} {'rank' if ranks.world_size == 1 else 'ranks'} on {ranks.device.type}",
        *data_lines,
        f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)",
        f"  {'group':<13}{'tensors':>9}{'parameters':>16}{'trained':>16}{'learning rate':>15}",
    ]
    for report in groups:
        rate = f"{report.lr:.2e}" if report.num_trained_tensors else "frozen"
        lines.append(
            f"  {report.group:<13}{report.num_tensors:>9}{report.num_parameters:>16,}"
            f"{report.num_trained_parameters:>16,}{rate:>15}"
        )
    return lines


def resume_lines(start_step: int, num_steps: int, damaged: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return the lines that say where a run resumes.

    damaged: why newer checkpoints are not used.
    changes: fields of the recipe that have other values since.
    """
    lines = [f"falling back to an earlier checkpoint: {reason}" for reason in damaged]
    if start_step >= num_steps:
        return [f"nothing to do: all {num_steps} steps are done", *lines]
    if start_step:
        lines.append(f"resuming after step {start_step} of {num_steps}")
    return lines + [f"changed, as checkpoint.allow_changes says: {change}" for change in changes]


class IndexProgress:
    """A context manager that shows how far indexing is: a bar on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("data: indexing rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=RichConsole(file=sys.stderr), transient=True,
        )  # fmt: skip
        self._task = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "IndexProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` rows are indexed."""
        if self._bar.console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._last_line >= _INDEX_LOG_SECONDS:
            self._last_line = time.monotonic()
            self._bar.console.print(f"data: indexed {done:,} of {total:,} rows", highlight=False)


class Console:
    """The progress of training: a bar on a terminal, plain lines in a log.

    A log gets a line for the first and the last step and at most one in LOG_SECONDS between: metrics.jsonl has every
    step.
    """

    def __init__(self, num_steps: int, *, start_step: int = 0, file: IO[str] | None = None) -> None:
        self.num_steps = num_steps
        self._file = file or sys.stdout
        self._seconds: deque[float] = deque(maxlen=50)
        self._last_line = -math.inf
        self._bar: Progress | None = None
        rich = RichConsole(file=self._file)
        if self._file.isatty() and not rich.is_dumb_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(12), TextColumn("{task.fields[numbers]}"))
            self._bar = bar = Progress(*columns, console=rich)
            self._task = bar.add_task("train", total=num_steps, completed=start_step, numbers="")
            bar.start()

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step; reads step, loss, lr, tokens_per_second and seconds of a metrics row."""
        self._seconds.append(metrics["seconds"])
        left = self.num_steps - metrics["step"]
        eta = timedelta(seconds=round(left * sum(self._seconds) / len(self._seconds)))
        loss = metrics["loss"] if metrics["loss"] is not None else math.nan
        numbers = f"loss {loss:.4f} lr {metrics['lr']:.2e} tokens/s {metrics['tokens_per_second']:,.0f} eta {eta}"
        if self._bar:
            self._bar.update(self._task, completed=metrics["step"], numbers=numbers)
        elif left == 0 or time.monotonic() - self._last_line >= LOG_SECONDS:
            self._last_line = time.monotonic()
            self.line(f"step {metrics['step']}/{self.num_steps} {numbers}")

    def line(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        text = public_text(text)
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Restore the terminal. Safe to call twice."""
        if self._bar:
            self._bar.stop()
