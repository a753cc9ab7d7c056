"""What a run records: metrics.jsonl, eval.jsonl, the tracker and the terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.stop import STOPPED, StopRequest
from qwen3vl_train.outputs import OutputError, append_text, writing
from qwen3vl_train.tracking.console import Console
from qwen3vl_train.tracking.metrics import (
    MetricsLog,
    StepTally,
    StepTimes,
    device_peak_flops,
    peak_memory_gib,
    step_metrics,
)
from qwen3vl_train.tracking.wandb import open_tracker
from qwen3vl_train.tracking.wandb_settings import wandb_settings


class Recorder:
    """A context manager, opened once a run. Rank 0 writes the files; every rank prints its lines to `out`.

    An exception that leaves the block marks the tracked run as failed, a StopRequest as one that will be resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        ranks: Ranks,
        out: TextIO,
        *,
        num_steps: int,
        start_step: int,
        wandb_run_id: str | None = None,
    ) -> None:
        self._recipe, self._folder, self._ranks = recipe, folder, ranks
        self._peak_flops = device_peak_flops(ranks.device)
        self._metrics = MetricsLog(folder / "metrics.jsonl") if ranks.is_main else None
        self._tracker = open_tracker(recipe, folder, ranks.rank, wandb_run_id)
        self._console = Console(num_steps, start_step=start_step, file=out)
        self._out_name = "the terminal" if ranks.is_main else getattr(out, "name", "the log of this rank")
        self.failure: OutputError | None = None
        """The first error of writing on this rank: the run ends with it, but saves what it has trained before."""
        for line in wandb_settings(recipe).unused if ranks.is_main else []:
            self.line(line)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self.deferring(), writing(self._out_name):
            self._console.close()
        if self._metrics:
            self._metrics.close()
        self._tracker.finish(STOPPED if isinstance(error, StopRequest) else int(error is not None))

    @property
    def wandb_run_id(self) -> str | None:
        """The id that a checkpoint keeps so that a resumed run is the same W&B run."""
        return self._tracker.run_id

    def step(self, tally: StepTally, packs: StepPacks, times: StepTimes, *, num_rejected: int) -> None:
        """Record one step; the tracker also gets gradient norms by module group and the loss of each data set."""
        row = step_metrics(
            tally, packs, times, num_rejected=num_rejected, max_tokens_per_pack=self._recipe.data.max_tokens_per_pack,
            world_size=self._ranks.world_size, peak_flops=self._peak_flops,
            peak_memory_gib=peak_memory_gib(self._ranks.device),
        )  # fmt: skip
        if self._metrics:
            with self.deferring():
                self._metrics.append(row)
        curves = {key: value for key, value in row.items() if key != "sources"}
        curves |= {f"grad_norm/{group}": norm for group, norm in tally.grad_norms.items()}
        curves |= {f"loss/{name}": of_source.loss for name, of_source in tally.sources.items()}
        with self.deferring():
            self._tracker.log(curves, tally.step)
        with self.deferring(), writing(self._out_name):
            self._console.step(row)

    def line(self, text: str) -> None:
        """Print a line where this rank prints."""
        with self.deferring(), writing(self._out_name):
            self._console.line(text)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Keep an error of writing as `failure`, and continue to the end of the step."""
        try:
            yield
        except OutputError as error:
            self.failure = self.failure or error

    def evaluation(self, step: int, name: str, loss: float, label_tokens: int, seconds: float) -> None:
        """Record the loss on a held-out file."""
        if not self._ranks.is_main:
            return
        row = {"step": step, "name": name, "loss": loss, "label_tokens": label_tokens, "seconds": seconds}
        with self.deferring():
            append_text(self._folder / "eval.jsonl", json.dumps(row) + "\n")
        with self.deferring():
            self._tracker.log({f"eval/{name}/loss": loss}, step)
        self.line(f"eval step {step}: {name} loss {loss:.4f} over {label_tokens} label tokens")
