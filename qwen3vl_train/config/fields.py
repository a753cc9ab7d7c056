"""The fields of a recipe, their types, bounds and defaults. Unknown keys and near-miss types ("4" for 4) are errors.

Relative paths are relative to the folder the command runs in. Reading and the texts of errors are in `loading`, rules
between fields in `rules`; a field added here needs nothing there.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator

from qwen3vl_train.config.data_fields import (
    Beta,
    Count,
    DataSection,
    Positive,
    Rate,
    Seconds,
    Section,
    Text,
    check_name,
)
from qwen3vl_train.config.tune_fields import Tune
from qwen3vl_train.config.yaml12 import format_value
from qwen3vl_train.modules import VISION_GROUPS


def is_hub_id(name: str) -> bool:
    """Return whether a text has the form owner/name, as names on the Hugging Face Hub."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", name))


def _check_hub_id(name: str) -> str:
    if not is_hub_id(name):
        raise ValueError(f"got {name[:120]!r}; write owner/name, as in Qwen/Qwen3-VL-4B-Instruct")
    return name


class ModelSection(Section):
    """Name the checkpoint to start from.

    path: a local folder in Hugging Face form, or a name on the Hugging Face Hub, such as Qwen/Qwen3-VL-4B-Instruct: it
        is downloaded once to the Hub's cache, and the run folder names the snapshot.
    revision: of a name on the Hub, the branch, tag or commit.
    hub_id: the name of this checkpoint on the Hugging Face Hub, which exports then carry in place of the path.
    video_markup: how a clip is written into the text. bare: as Qwen's own code and transformers up to 5.9 do;
        wrapped: with one more pair of vision tokens around it, as transformers 5.10 to 5.23 do. Train what will serve.
    """

    path: Text
    revision: Text | None = None
    hub_id: Annotated[str, AfterValidator(_check_hub_id)] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    video_markup: Literal["bare", "wrapped"] = "bare"

    @property
    def public_name(self) -> str:
        """The name by which an export refers to its base: on the hub, or else an absolute path."""
        return self.hub_id or str(Path(self.path).absolute())


def _check_steps_or_share(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"got {format_value(value)}, expected a number")
    if not (value >= 0 if isinstance(value, int) else 0 <= value < 1):
        raise ValueError(f"got {value}; use a whole number of steps, or a share of the run below 1")
    return value


class OptimSection(Section):
    """Set up AdamW and its learning rate. A vision_lr, merger_lr or deepstack_lr of null takes lr.

    lora_b_lr: the rate of the B matrices of all adapters (LoRA+); null: that of their group.
    warmup: over how many steps the rate rises, or over which share of the run if it is below 1. Older recipes call it
        warmup_steps.
    schedule: how the rate falls after it; wsd keeps it constant and lets it fall linearly at the end.
    decay_share: of wsd, the share of the run in which it falls.
    min_lr: what lr falls to at the end; the rates of groups fall by the same factor.
    max_grad_norm: gradients of a larger norm are scaled down to it; 0 and null are off.
    """

    lr: Rate = 1e-4
    vision_lr: Rate | None = None
    merger_lr: Rate | None = None
    deepstack_lr: Rate | None = None
    lora_b_lr: Rate | None = None
    # strict=False for the container alone: YAML has lists only. Its numbers stay strict.
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    warmup: Annotated[
        int | float,
        Field(validation_alias=AliasChoices("warmup", "warmup_steps")),
        BeforeValidator(_check_steps_or_share),
    ] = 0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0)] | None = 1.0

    @field_validator("max_grad_norm")
    @classmethod
    def _zero_is_off(cls, value: float | None) -> float | None:
        return value or None

    def warmup_steps(self, num_steps: int) -> int:
        """Return the number of warm-up steps of a run of so many steps."""
        return self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * num_steps)

    def lr_of(self, group: str, *, is_lora_b: bool = False) -> float:
        """Return the peak learning rate of a module group, or of the B matrices of its adapters."""
        if is_lora_b and self.lora_b_lr is not None:
            return self.lora_b_lr
        own = {"merger": self.merger_lr, "deepstack": self.deepstack_lr, **dict.fromkeys(VISION_GROUPS, self.vision_lr)}
        return own.get(group) or self.lr


def _as_int_if_whole(value: float) -> float:
    return int(value) if value.is_integer() else value


Checkpointing = Literal["none", "full", "selective"]


class CheckpointingSection(Section):
    """Set activation checkpointing of each tower. selective keeps the results of matrix products and attention."""

    vision: Checkpointing = "none"
    text: Checkpointing = "none"

    @model_validator(mode="before")
    @classmethod
    def _same_for_both(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in get_args(Checkpointing):
            raise ValueError(f"got {value!r}; use none, full or selective, or a section with vision and text")
        return {"vision": value, "text": value} if isinstance(value, str) else value


class TrainSection(Section):
    """Say how long to train, and in which steps.

    num_steps: wins over num_epochs if both are given.
    num_epochs: may be a fraction, such as 0.5; the last epoch then ends at the nearest step.
    packs_per_step: counts the packs of all ranks together.
    activation_checkpointing: one word for both towers, or {vision: ..., text: ...}.
    deterministic: use only kernels that give the same bits every time; slower on a GPU.
    """

    num_steps: Count | None = None
    num_epochs: Annotated[float, Field(gt=0.0, le=1e6), AfterValidator(_as_int_if_whole)] | None = 1
    packs_per_step: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    activation_checkpointing: CheckpointingSection = CheckpointingSection()
    deterministic: bool = False


class ParallelSection(Section):
    """Say how the ranks share one model; the results are the same. docs/scaling.md says which engine to take.

    timeout_seconds: how long a collective waits for the last rank before the run ends and names it.
    replicate, shard: of fsdp2, copies of the model and shards of each (null: all ranks); more than one copy is HSDP.
    reshard_after_forward: of fsdp2, free gathered weights after each forward pass; auto keeps them if they are small.
    zero_stage, offload_optimizer, offload_parameters: of deepspeed.
    deepspeed_config: of deepspeed, a JSON file of the user's; what contradicts the recipe is an error.
    """

    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] = "ddp"
    timeout_seconds: Seconds = 1800.0
    replicate: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    shard: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: Literal["auto", True, False] = "auto"
    cpu_offload: bool = False
    zero_stage: Literal[1, 2, 3] = 2
    deepspeed_config: Text | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False


def _no_steps_with_epochs(section: Any) -> Any:
    """Let every_epochs take the place of the default of every_steps."""
    if isinstance(section, dict) and section.get("every_epochs") is not None:
        return {"every_steps": None, **section}
    return section


# Of `train`, what may change in a run under way: how long it is. All of `optim` may.
_CHANGEABLE = ("train.num_steps", "train.num_epochs")


def may_change(key: str) -> bool:
    """Return whether a run under way may go on with another value: not with another model, data or order of it."""
    section, _, field = key.partition(".")
    return key in _CHANGEABLE or (section == "optim" and field in OptimSection.model_fields)


def _check_change(key: str) -> str:
    if not may_change(key):
        what = "cannot change in a run under way: the model, the data and their order are part of it"
        raise ValueError(f"{key} {what}; fields of optim, {' and '.join(_CHANGEABLE)} can")
    return key


class CheckpointSection(Section):
    """Say which checkpoints are written and kept.

    every_steps, every_epochs: one every so many steps, every so many epochs, or both. The default of every_steps is for
        recipes without every_epochs.
    save_last: also write one after the last step.
    keep_optimizer: last removes the optimizer's state, two thirds of a checkpoint, from those that keep_every_steps and
        keep_best keep; these can be exported, but not resumed from.
    keep_every_steps: checkpoints at multiples of it are never deleted.
    keep_best: name of a held-out set; the checkpoint with its lowest loss is kept.
    export_every_steps, export_every_epochs: also write the Hugging Face form, to `export/` in the run folder, of which
        the same are kept as of checkpoints.
    allow_changes: fields, such as optim.lr and train.num_steps, whose new values a run under way takes over; otherwise
        a changed recipe is another run. The schedule follows from the new values, the optimizer and the data continue.
    """

    every_steps: Count | None = 200
    every_epochs: Count | None = None
    save_last: bool = True
    keep_last: Count = 2
    keep_every_steps: Count | None = None
    keep_best: Text | None = None
    keep_optimizer: Literal["all", "last"] = "all"
    export_every_steps: Count | None = None
    export_every_epochs: Count | None = None
    resume: Literal["auto", "never"] = "auto"
    allow_changes: list[Annotated[str, AfterValidator(_check_change)]] = Field(default_factory=list)

    _steps_unless_epochs = model_validator(mode="before")(_no_steps_with_epochs)


class EvalSection(Section):
    """Say when the loss on the held-out sets is computed, besides after the last step.

    every_steps, every_epochs: as of checkpoints.
    """

    every_steps: Count | None = 200
    every_epochs: Count | None = None

    _steps_unless_epochs = model_validator(mode="before")(_no_steps_with_epochs)


class TrackSection(Section):
    """Say what Weights & Biases records, and where.

    A field that is null takes the variable that W&B reads: WANDB_MODE, WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY,
    WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES. Without that, wandb is offline, project is qwen3vl and run_name is the
    name of the recipe.
    """

    wandb: Literal["offline", "online", "off"] | None = None
    project: Text | None = None
    run_name: Text | None = None
    entity: Text | None = None
    group: Text | None = None
    tags: list[Text] | None = None
    notes: Text | None = None


class Recipe(Section):
    """Hold everything about a run. `load_recipe` and `recipe_from_dict` make it and check the rules between fields."""

    name: Annotated[str, AfterValidator(check_name)]
    output_dir: Text = "runs"
    model: ModelSection
    tune: Tune
    data: DataSection
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    track: TrackSection = TrackSection()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with every default filled in, which `recipe_from_dict` reads back."""
        return self.model_dump(mode="json")
