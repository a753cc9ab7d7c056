"""Write a recipe to the run folder, show it to a tracker without its secrets, and compare it with another one."""

import os
import re
from pathlib import Path
from typing import Any

from qwen3vl_train.atomic_file import atomic_file
from qwen3vl_train.config.fields import Recipe
from qwen3vl_train.config.yaml12 import format_value, write_yaml
from qwen3vl_train.public_names import public_values

# These fields change where and how a run is executed, saved, evaluated and tracked, never which weights come out.
# Activation checkpointing repeats the same arithmetic; the share of rejected rows only decides when to give up.
_NOT_TRAINING = ("name", "output_dir", "checkpoint", "eval", "track", "parallel")
_NOT_TRAINING_KEYS = (
    "model.hub_id", "data.num_workers", "data.max_rejected_fraction", "data.eval", "train.activation_checkpointing",
)  # fmt: skip


# Paths: what is read there decides, whatever it is called.
_PATH_KEY = re.compile(r"model\.path|tune\.start_from|data\.train\.\d+\.(path|media_root)")


def run_dir(recipe: Recipe) -> Path:
    """Return the folder of the run: `output_dir/name`."""
    return Path(recipe.output_dir) / recipe.name


def public_dict(recipe: Recipe) -> dict[str, Any]:
    """Return `recipe.to_dict()` with what may be secret in addresses replaced by ***, for files and trackers.

    s3://user:password@host/a.jsonl -> s3://***@host/a.jsonl
    """
    return public_values(recipe.to_dict())


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with every default filled in and URLs redacted; a file that holds just that is not touched."""
    path, content = Path(path), write_yaml(public_dict(recipe)).encode()
    if not path.is_file() or path.read_bytes() != content:
        with atomic_file(path, flushed=True) as temporary:
            temporary.write_bytes(content)


def recipe_differences(there: Recipe, here: Recipe) -> dict[str, str]:
    """Return the fields that change training and differ: `optim.lr` -> `optim.lr: 0.0001 there, 2e-05 here`.

    there: the recipe that a run was started with. URLs are compared redacted, as its folder keeps them. A path is
    compared by the place that it leads to; a place that is gone differs from none, the data decides.
    """
    old, new = flatten(public_dict(there)), flatten(public_dict(here))
    lines: dict[str, str] = {}
    for key in dict.fromkeys([*old, *new]):
        parts = key.split(".")
        skipped = parts[0] in _NOT_TRAINING or ".".join(parts[:2]) in _NOT_TRAINING_KEYS
        was, now = (side.get(key, "absent") for side in (old, new))
        if not skipped and was != now and not (_PATH_KEY.fullmatch(key) and _same_place(was, now)):
            was, now = (value if isinstance(value, str) else format_value(value) for value in (was, now))
            lines[key] = f"{key}: {was} there, {now} here"
    return lines


def _same_place(was: Any, now: Any) -> bool:
    if not (isinstance(was, str) and isinstance(now, str)) or "absent" in (was, now) or "://" in was + now:
        return False
    return not os.path.exists(was) or os.path.realpath(was) == os.path.realpath(now)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections under dotted keys: a list of sections by index, a list of plain values as one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
