"""Everything a run tells: metrics.jsonl, eval.jsonl, rejected.jsonl, the tracker and the terminal.

Rank 0 writes these; other ranks print their lines to a file of their own.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.stop import STOPPED, StopRequest
from qwen3vl_train.tracking.metrics import MetricsLog, StepTally, device_peak_flops, peak_memory_gib, step_metrics
from qwen3vl_train.tracking.wandb import Console, open_tracker
from qwen3vl_train.train.evaluate import EvalLoss
from qwen3vl_train.train.run_folder import REJECTED_FILE, RejectLog


class Recorder:
    """Opened once a run, as a with-block; an exception that leaves the block marks the tracked run as failed, a
    StopRequest as one that will go on.

    wandb_run_id: of the run that goes on, as its checkpoint has it.
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
        self._folder, self._ranks = folder, ranks
        self._peak_flops = device_peak_flops(ranks.device)
        self._metrics = MetricsLog(folder / "metrics.jsonl") if ranks.is_main else None
        self._rejects = RejectLog(folder / REJECTED_FILE, writes=ranks.is_main)
        self._tracker = open_tracker(recipe, folder, ranks.rank, wandb_run_id)
        self._console = Console(num_steps, start_step=start_step, file=out)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        if self._metrics:
            self._metrics.close()
        if isinstance(error, StopRequest):
            self._tracker.finish(STOPPED)
        else:
            self._tracker.finish(0 if error is None else 1)

    @property
    def wandb_run_id(self) -> str | None:
        """What a checkpoint keeps so that the run goes on as the same W&B run; None where there is none."""
        return self._tracker.run_id

    def line(self, text: str) -> None:
        self._console.line(text)

    def step(self, tally: StepTally, grad_norms: dict[str, float]) -> None:
        """Write one step; grad_norms of the module groups, and a curve for each data set, go to the tracker."""
        row = step_metrics(
            tally,
            world_size=self._ranks.world_size,
            peak_flops=self._peak_flops,
            peak_memory_gib=peak_memory_gib(self._ranks.device),
        )
        if self._metrics:
            self._metrics.append(row)
        curves = {key: value for key, value in row.items() if key != "sources"}
        curves |= {f"grad_norm/{group}": norm for group, norm in grad_norms.items()}
        curves |= {f"loss/{name}": of_source.loss for name, of_source in tally.sources.items()}
        self._tracker.log(curves, tally.step)
        self._console.step(row)

    def evaluation(self, step: int, name: str, result: EvalLoss, seconds: float) -> None:
        if not self._ranks.is_main:
            return
        row = {"step": step, "name": name, "loss": result.loss, "label_tokens": result.label_tokens, "seconds": seconds}
        with (self._folder / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._tracker.log({f"eval/{name}/loss": result.loss}, step)
        self.line(f"eval step {step}: {name} loss {result.loss:.4f} over {result.label_tokens} label tokens")

    def rejected(self, rejects: list[Reject]) -> None:
        """List rows that were left out, and say so; each is listed once, however often it is met."""
        for reject in self._rejects.add(rejects):
            self.line(f"left out: {reject}")
