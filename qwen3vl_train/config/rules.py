"""Rules between the fields of a recipe, or between a recipe and the number of ranks; and the error they raise."""

from collections.abc import Collection, Iterator
from pathlib import Path

from qwen3vl_train.config.fields import OptimSection, ParallelSection, Recipe
from qwen3vl_train.config.tune_fields import LoraTune, number_of
from qwen3vl_train.modules import VISION_GROUPS, expand_groups
from qwen3vl_train.public_names import last_part

Conflict = tuple[str, str]  # (dotted key, what contradicts it and what to do)

# Fields of `parallel` that only some engines use, and the value of each that asks for nothing.
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
# No lower limit may be above its upper one, and no limit of an image above that of its sample.
_RISING = (
    ("min_visual_tokens_per_image", "max_visual_tokens_per_image"),
    ("min_visual_tokens_per_image", "max_visual_tokens_per_sample"),
    ("min_frames", "max_frames"),
    ("max_tokens_per_sample", "max_tokens_per_pack"),
)
_GROUPS_OF_RATE = {"vision_lr": VISION_GROUPS, "merger_lr": ("merger",), "deepstack_lr": ("deepstack",)}


class RecipeError(ValueError):
    """Every error of a recipe at once: file or name and a count, then a line each, `key: what we got; what to do`."""

    def __init__(self, where: str, errors: list[str]) -> None:
        self.where, self.errors = where, errors
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        super().__init__("\n  - ".join([f"{where}: {count}", *errors]))


def field_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield every contradiction between fields."""
    data, train, tune = recipe.data, recipe.train, recipe.tune
    for low, high in _RISING:
        least, most = getattr(data, low), getattr(data, high)
        if least is not None and most is not None and least > most:
            yield f"data.{low}", f"{least} is more than data.{high} {most}; lower it"
    yield from learning_rate_conflicts(
        recipe.optim,
        tune.trained_groups(),
        listed=tune.listed_in(),
        all_groups_known=not tune.has_patterns(),
    )
    if isinstance(tune, LoraTune):
        yield from _lora_conflicts(tune)
    elif recipe.optim.lora_b_lr is not None:
        yield "optim.lora_b_lr", "set, but tune.method full has no adapters; remove it"
    yield from _schedule_conflicts(recipe.optim)
    if train.num_steps is None and train.num_epochs is None:
        yield "train.num_steps", "missing, and train.num_epochs is null; give one of them"
    elif train.num_steps is None and any(source.streaming for source in data.train):
        yield "train.num_steps", "missing; a source with streaming does not say how long an epoch is"
    yield from _stream_conflicts(recipe)
    yield from _engine_conflicts(recipe.parallel)
    yield from _keep_best_conflicts(recipe)


def _lora_conflicts(tune: LoraTune) -> Iterator[Conflict]:
    """Yield what numbers by group contradict; what regular expressions reach is known only with the model."""
    both = [group for group in expand_groups(tune.full) if group in ("text_embed", "lm_head")]
    if tune.new_tokens and both:
        yield "tune.new_tokens", f"set, but tune.full trains all rows of {' and '.join(both)}; remove one"
    if tune.start_from is not None and "targets" not in tune.model_fields_set:
        return  # checked again once they are known
    groups = tune.adapted_groups()
    for number, name in enumerate(tune.full):
        if both := [group for group in expand_groups([name]) if group in groups]:
            yield f"tune.full.{number}", f"{', '.join(both)} is in tune.targets too; take it out of one of them"
    for field in ("rank", "alpha"):
        value = getattr(tune, field)
        if isinstance(value, int):
            continue
        if missing := [group for group in groups if number_of(value, group) is None]:
            yield f"tune.{field}", f"has no number for {', '.join(missing)}, which tune.targets names; add one"
        for name in value:
            if not tune.has_patterns() and not set(expand_groups([name])) & set(groups):
                yield f"tune.{field}.{name}", "tune.targets names no such group; add it there or remove it here"


def _schedule_conflicts(optim: OptimSection) -> Iterator[Conflict]:
    if optim.min_lr > optim.lr:
        yield "optim.min_lr", f"{optim.min_lr:g} is more than optim.lr {optim.lr:g}, from which it falls; lower it"
    if optim.min_lr and optim.schedule == "constant":
        yield "optim.min_lr", f"{optim.min_lr:g}, but optim.schedule is constant and never falls; remove it"
    if optim.schedule != "wsd" and optim.decay_share != OptimSection().decay_share:
        yield "optim.decay_share", f"{optim.decay_share:g}, only for schedule wsd, not {optim.schedule}; remove it"
    if optim.schedule == "wsd" and isinstance(optim.warmup, float) and optim.warmup + optim.decay_share > 1:
        what = f"{optim.decay_share:g} and optim.warmup {optim.warmup:g} are more than the run; lower one"
        yield "optim.decay_share", what


def learning_rate_conflicts(
    optim: OptimSection, trained_groups: Collection[str], *, listed: str, all_groups_known: bool = True
) -> Iterator[Conflict]:
    """Yield the learning rates that contradict what trains.

    listed: the field of the recipe that names them.
    all_groups_known: False while a regular expression may reach more groups, which only the model can show.
    """
    for field, groups in _GROUPS_OF_RATE.items():
        if getattr(optim, field) is not None and all_groups_known and not set(groups) & set(trained_groups):
            what = f"set, but {listed} trains no {' or '.join(groups)}; add one there or remove {field}"
            yield f"optim.{field}", what
    if optim.merger_lr is not None and optim.deepstack_lr is None and "deepstack" in trained_groups:
        what = f"missing beside optim.merger_lr {optim.merger_lr:g}, which is for the main merger alone; give both"
        yield "optim.deepstack_lr", what


def _engine_conflicts(parallel: ParallelSection) -> Iterator[Conflict]:
    for field, (engines, nothing) in _ENGINES_OF.items():
        value = getattr(parallel, field)
        if parallel.engine not in engines and value != nothing:
            got = str(value).lower() if isinstance(value, bool) else value
            what = f"{got}, only for {' and '.join(engines)}, but parallel.engine is {parallel.engine}; remove it"
            yield f"parallel.{field}", what
    if parallel.engine == "deepspeed" and parallel.offload_parameters and parallel.zero_stage < 3:
        what = f"true, but stage {parallel.zero_stage} does not shard parameters; set parallel.zero_stage to 3"
        yield "parallel.offload_parameters", what


def _stream_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    every = {
        "checkpoint.every_epochs": recipe.checkpoint.every_epochs,
        "checkpoint.export_every_epochs": recipe.checkpoint.export_every_epochs,
        "eval.every_epochs": recipe.eval.every_epochs,
    }
    if any(source.streaming for source in recipe.data.train):
        if recipe.data.eval_share is not None:
            what = f"{recipe.data.eval_share:g}, but a source with streaming does not say how many rows it has"
            yield "data.eval_share", f"{what}; give held-out rows in data.eval"
        for key, epochs in every.items():
            if epochs is not None:
                yield key, f"{epochs}, but a source with streaming does not say where an epoch ends; give steps instead"


def _keep_best_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    wanted = recipe.checkpoint.keep_best
    save, evaluate = recipe.checkpoint, recipe.eval
    intervals = [
        ("steps", save.every_steps, evaluate.every_steps),
        ("epochs", save.every_epochs, evaluate.every_epochs),
    ]
    if wanted is None:
        return
    names = [source.name or Path(last_part(source.path)).stem for source in recipe.data.eval]
    names += ["held_out"] if recipe.data.eval_share else []
    if wanted not in names:
        known = f"use {' or '.join(names)}" if names else "name a held-out file in data.eval"
        yield "checkpoint.keep_best", f"{wanted!r} is not a held-out set; {known}"
        return
    for unit, saved, evaluated in intervals:
        if saved and (evaluated is None or saved % evaluated):
            what = f"checkpoints every {saved} {unit} are not evaluated, with eval.every_{unit} {evaluated or 'null'}"
            yield "checkpoint.keep_best", f"{what}; make checkpoint.every_{unit} a multiple of it"


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Raise RecipeError with every reason why this recipe cannot run on so many ranks."""
    errors = []
    packs = recipe.train.packs_per_step
    if packs % world_size:
        first = max(1, packs // world_size) * world_size
        near = f"use {first}, {first + world_size} or {first + 2 * world_size}"
        errors.append(f"train.packs_per_step: {packs} does not divide by {world_size} ranks; {near}")
    if recipe.parallel.engine == "single" and world_size > 1:
        errors.append(f"parallel.engine: single, but {world_size} ranks were started; use ddp or start one process")
    if errors:
        raise RecipeError(f"recipe {recipe.name}", errors)
