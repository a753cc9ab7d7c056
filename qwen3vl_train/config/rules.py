"""Rules that join several fields of a recipe, or a recipe and the ranks that were started; and the error they raise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_train.modules import VISION_GROUPS

if TYPE_CHECKING:
    from qwen3vl_train.config.fields import (
        CheckpointSection,
        DataSection,
        EvalSection,
        FullTune,
        LoraTune,
        OptimSection,
        ParallelSection,
        Recipe,
        TrainSection,
    )

# Fields of `parallel` that mean something to some engines alone, and the value of each that asks for nothing.
_ENGINES_OF = {
    "replicate": (("fsdp2",), 1),
    "shard": (("fsdp2",), None),
    "reshard_after_forward": (("fsdp2",), "auto"),
    "cpu_offload": (("fsdp2",), False),
    "reduce_dtype": (("fsdp2", "deepspeed"), "float32"),
    "zero_stage": (("deepspeed",), 2),
    "deepspeed_config": (("deepspeed",), None),
    "offload_optimizer": (("deepspeed",), False),
    "offload_parameters": (("deepspeed",), False),
}


class RecipeError(ValueError):
    """Every error of a recipe at once: a count, then one line each, `key: what we got; what to do`.

    where: file or recipe the lines are about. errors: the lines without their bullets.
    """

    def __init__(self, where: str, errors: list[str]) -> None:
        self.where, self.errors = where, errors
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        super().__init__("\n".join([f"{where}: {count}", *(f"  - {error}" for error in errors)]))


def field_conflicts(
    tune: LoraTune | FullTune | None,
    data: DataSection | None,
    optim: OptimSection | None,
    train: TrainSection | None,
    parallel: ParallelSection | None,
    checkpoint: CheckpointSection | None,
    evaluation: EvalSection | None,
) -> list[tuple[str, str]]:
    """Contradictions between fields as (dotted key, message). A section with faults of its own comes as None."""
    conflicts: list[tuple[str, str]] = []
    if data:
        conflicts += _budget_conflicts(data)
    if tune and optim:
        conflicts += _learning_rate_conflicts(tune, optim)
    if train and train.num_steps is None and train.num_epochs is None:
        conflicts.append(("train.num_steps", "missing, and train.num_epochs is null; give one of them"))
    elif data and train and train.num_steps is None and any(source.streaming for source in data.train):
        conflicts.append(("train.num_steps", "missing; a source with streaming does not say how long an epoch is"))
    if parallel:
        conflicts += _engine_conflicts(parallel)
    if checkpoint and checkpoint.keep_best is not None and data:
        conflicts += _keep_best_conflicts(checkpoint, data, evaluation)
    return conflicts


def _budget_conflicts(data: DataSection) -> list[tuple[str, str]]:
    """No lower limit may lie above its upper one, no medium's least above what its sample may take."""
    rising = (
        ("min_visual_tokens_per_image", "max_visual_tokens_per_image"),
        ("min_visual_tokens_per_image", "max_visual_tokens_per_sample"),
        ("min_frames", "max_frames"),
        ("max_tokens_per_sample", "max_tokens_per_pack"),
    )
    conflicts: list[tuple[str, str]] = []
    for low, high in rising:
        least, most = getattr(data, low), getattr(data, high)
        if least is not None and most is not None and least > most:
            conflicts.append((f"data.{low}", f"{least} is more than data.{high} {most}; lower it"))
    return conflicts


def _engine_conflicts(parallel: ParallelSection) -> list[tuple[str, str]]:
    conflicts: list[tuple[str, str]] = []
    for field, (engines, nothing) in _ENGINES_OF.items():
        value = getattr(parallel, field)
        if parallel.engine not in engines and value != nothing:
            got = str(value).lower() if isinstance(value, bool) else value
            what = f"{got}, but parallel.engine is {parallel.engine}; it is for {' and '.join(engines)}, leave it out"
            conflicts.append((f"parallel.{field}", what))
    if parallel.engine == "deepspeed" and parallel.offload_parameters and parallel.zero_stage < 3:
        what = f"true, but stage {parallel.zero_stage} does not cut up parameters; set parallel.zero_stage to 3"
        conflicts.append(("parallel.offload_parameters", what))
    return conflicts


def _keep_best_conflicts(
    checkpoint: CheckpointSection, data: DataSection, evaluation: EvalSection | None
) -> list[tuple[str, str]]:
    key, wanted = "checkpoint.keep_best", checkpoint.keep_best
    names = [source.name or Path(source.path).stem for source in data.eval]
    if wanted not in names:
        known = f"use {' or '.join(names)}" if names else "name a held-out file in data.eval"
        return [(key, f"{wanted!r} is no held-out set; {known}")]
    saves, looks = checkpoint.every_steps, evaluation.every_steps if evaluation else None
    if saves and evaluation and (looks is None or saves % looks):
        what = f"checkpoints every {saves} steps are not evaluated, with eval.every_steps {looks or 'null'}"
        return [(key, f"{what}; make checkpoint.every_steps a multiple of it")]
    return []


def _learning_rate_conflicts(tune: LoraTune | FullTune, optim: OptimSection) -> list[tuple[str, str]]:
    trained = tune.trained_groups()
    conflicts: list[tuple[str, str]] = []
    owners = {"vision_lr": VISION_GROUPS, "merger_lr": ("merger",), "deepstack_lr": ("deepstack",)}
    listed = "tune.train" if tune.method == "full" else "tune.targets"
    for field, groups in owners.items():
        # A regular expression may reach any group, so then only the model can tell.
        if getattr(optim, field) is not None and not tune.has_patterns() and not set(groups) & set(trained):
            what = f"set, but {listed} trains no {' or '.join(groups)}; add one there or leave {field} out"
            conflicts.append((f"optim.{field}", what))
    if optim.merger_lr is not None and optim.deepstack_lr is None and "deepstack" in trained:
        what = f"missing beside optim.merger_lr {optim.merger_lr:g}, which is for the main merger alone; give both"
        conflicts.append(("optim.deepstack_lr", what))
    return conflicts


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Refuse a number of ranks that this recipe cannot run on. Raises RecipeError with every reason."""
    errors: list[str] = []
    packs = recipe.train.packs_per_step
    if packs % world_size:
        first = max(1, packs // world_size) * world_size
        near = f"use {first}, {first + world_size} or {first + 2 * world_size}"
        errors.append(f"train.packs_per_step: {packs} does not divide by {world_size} ranks; {near}")
    if recipe.parallel.engine == "single" and world_size > 1:
        errors.append(f"parallel.engine: single, but {world_size} ranks were started; use ddp or start one process")
    if errors:
        raise RecipeError(f"recipe {recipe.name}", errors)
