"""What a run asks of W&B: fields of `track`, and where the recipe is silent, the variables that W&B's users set."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3vl_train.config import Recipe, recipe_from_dict

# W&B's words for a mode -> ours; `dryrun` and `run` are of its first versions.
_MODES = {"online": "online", "offline": "offline", "disabled": "off", "dryrun": "offline", "run": "online"}
_VARIABLES = {
    "wandb": "WANDB_MODE",
    "project": "WANDB_PROJECT",
    "run_name": "WANDB_NAME",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}
"""Field of `track` -> the variable that says the same."""


@dataclass(frozen=True)
class WandbSettings:
    """mode: online, offline or off. trial: the id of a sweep's trial. unused: lines on variables that are not used."""

    mode: str
    project: str
    run_name: str
    entity: str | None
    group: str | None
    tags: list[str] | None
    notes: str | None
    trial: str | None
    unused: list[str]


def wandb_settings(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> WandbSettings:
    """Return the settings of a run. Raises ValueError for a WANDB_MODE that is not one of W&B's.

    In a sweep, `wandb agent` decides on project and entity, and reads what is online.
    """
    values: dict[str, Any] = {}
    unused: list[str] = []
    for field, variable in _VARIABLES.items():
        given, text = getattr(recipe.track, field), environ.get(variable) or None
        said: Any = _mode(text) if text and field == "wandb" else text.split(",") if text and field == "tags" else text
        if given is not None and said is not None and given != said:
            shown = ", ".join(given) if isinstance(given, list) else given
            unused.append(f"track.{field}: {shown} in the recipe, so {variable}={text} is not used")
        values[field] = said if given is None else given
    trial = sweep_trial(environ)
    mode = values.pop("wandb") or ("online" if trial else "offline")
    if trial and mode != "online":
        unused.append(f"track.wandb: {mode}, so the sweep of this trial sees no metrics; set it to online or remove it")
    values["project"] = values["project"] or "qwen3vl"
    values["run_name"] = values["run_name"] or recipe.name
    return WandbSettings(mode, **values, trial=trial, unused=unused)


def _mode(text: str) -> str:
    if text.lower() not in _MODES:
        raise ValueError(f"WANDB_MODE: got {text!r}; use online, offline or disabled, or unset it")
    return _MODES[text.lower()]


def sweep_trial(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the id that `wandb agent` gave this trial of a sweep; None outside of one."""
    return environ.get("WANDB_RUN_ID") if environ.get("WANDB_SWEEP_ID") else None


def name_trial(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> Recipe:
    """Return the recipe with the id of the sweep's trial after its name, so that each trial has its own run folder.

    Every rank is given the same environment by its launcher, and so the same name.
    """
    trial = sweep_trial(environ)
    return recipe_from_dict({**recipe.to_dict(), "name": f"{recipe.name}-{trial}"}) if trial else recipe
