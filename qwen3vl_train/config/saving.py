"""A recipe on its way out: to the run folder, to a tracker, or beside another one."""

import os
import re
from pathlib import Path
from typing import Any

from qwen3vl_train.config.fields import Recipe
from qwen3vl_train.config.yaml12 import shown, write_yaml

_USER_INFO = re.compile(r"([A-Za-z][\w+.-]*://)[^/@\s]+@")
_SECRET_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:token|key|secret|password|signature|credential)[^=&\s]*=)[^&\s]*")

# What these change is where a run is written, watched, measured or carried out, never which weights come out.
# Activation checkpointing repeats the same arithmetic; the share of rejected rows only decides when to give up.
_NOT_TRAINING = ("name", "output_dir", "checkpoint", "eval", "track", "parallel")
_NOT_TRAINING_KEYS = ("data.num_workers", "data.max_rejected_fraction", "data.eval", "train.activation_checkpointing")


def run_dir(recipe: Recipe) -> Path:
    """Folder of the run: `output_dir/name`."""
    return Path(recipe.output_dir) / recipe.name


def public_dict(recipe: Recipe) -> dict[str, Any]:
    """`recipe.to_dict()` with passwords and keys inside addresses replaced by ***, for files and trackers.

    s3://user:password@host/a.jsonl -> s3://***@host/a.jsonl
    """
    return _redact(recipe.to_dict())


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redact(inner) for inner in value]
    if isinstance(value, str):
        return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", value))
    return value


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with every default filled in and addresses redacted; written aside and renamed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(write_yaml(public_dict(recipe)), encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def recipe_differences(there: Recipe, here: Recipe) -> list[str]:
    """Fields that change training and differ, as `optim.lr: 0.0001 there, 2e-05 here`.

    there: the recipe a run was started with. Addresses are compared redacted, as a run folder keeps them.
    """
    old, new = _flat(public_dict(there)), _flat(public_dict(here))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        skipped = key.split(".")[0] in _NOT_TRAINING or key.startswith(_NOT_TRAINING_KEYS)
        if not skipped and old.get(key, "absent") != new.get(key, "absent"):
            was, now = (_plain(side.get(key, "absent")) for side in (old, new))
            lines.append(f"{key}: {was} there, {now} here")
    return lines


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; a list of sections by place, a list of plain values as one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
