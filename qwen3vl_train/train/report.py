"""What a run prints before its first step: what it reads, what trains, and how long it will be."""

from pathlib import Path

from torch import nn

from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.train.data import TrainingData
from qwen3vl_train.train.tune import report_groups


def start_report(
    recipe: Recipe,
    ranks: Ranks,
    model: nn.Module,
    data: TrainingData,
    folder: Path,
    start_step: int,
    damaged: list[str],
) -> list[str]:
    """Lines for the terminal: run, data, and a table of module groups with tensors, parameters and learning rates."""
    reports = report_groups(model, recipe)
    trained = sum(report.num_trained_parameters for report in reports)
    total = sum(report.num_parameters for report in reports)
    method = recipe.tune.method
    if isinstance(recipe.tune, LoraTune):
        method = f"LoRA rank {recipe.tune.rank}"
    lines = [
        f"run {folder}: {recipe.model.path} in {recipe.model.dtype}, {method}, "
        f"{ranks.world_size} {'rank' if ranks.world_size == 1 else 'ranks'} on {ranks.device.type}",
        *data.report_lines(),
        f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)",
        f"  {'group':<13}{'tensors':>9}{'parameters':>16}{'trained':>16}{'learning rate':>15}",
    ]
    for report in reports:
        rate = f"{report.lr:.2e}" if report.num_trained_tensors else "frozen"
        lines.append(
            f"  {report.group:<13}{report.num_tensors:>9}{report.num_parameters:>16,}"
            f"{report.num_trained_parameters:>16,}{rate:>15}"
        )
    if start_step >= data.num_steps:
        lines.append(f"nothing to do: all {data.num_steps} steps are done")
    for fault in damaged:
        lines.append(f"falling back to an earlier checkpoint: {fault}")
    if 0 < start_step < data.num_steps:
        lines.append(f"resuming after step {start_step} of {data.num_steps}")
    return lines
