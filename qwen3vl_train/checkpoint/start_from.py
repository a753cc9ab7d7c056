"""Start from the weights of an earlier run or of a peft adapter: what they decide of `tune`, and how they are read."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, TOKEN_ROWS
from qwen3vl_train.checkpoint.hf import WeightFiles
from qwen3vl_train.checkpoint.manifest import latest_checkpoint, read_manifest
from qwen3vl_train.checkpoint.writer import load_weights, stored_weights
from qwen3vl_train.config import FullTune, LoraTune, Recipe, load_recipe, recipe_from_dict, run_dir
from qwen3vl_train.config.tune_fields import number_of
from qwen3vl_train.dist.tensors import copy_local_shard, global_shape
from qwen3vl_train.model.hf_names import from_huggingface, to_huggingface
from qwen3vl_train.model.lora import ADAPTER, is_adapter, lora_modules
from qwen3vl_train.model.new_rows import is_new_rows
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.modules import GROUPS, LORA_GROUPS, group_of

_RECIPE_FILE = "recipe.yaml"
# Initialisations of peft that change the base weights: the adapter alone is not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# Fields of `tune` that what was trained before decides.
_DECIDED = ("rank", "alpha", "targets", "rslora", "dora", "full", "new_tokens")


@dataclass(frozen=True)
class _Source:
    """What a run folder or an adapter folder holds.

    shapes: of its tensors, by our names.
    row_ids: of an adapter, the tokens of its rows in their order.
    """

    folder: Path
    tune: LoraTune | FullTune
    shapes: Mapping[str, tuple[int, ...]]
    checkpoint: Path | None  # of a run
    base: int | str | None  # fingerprint or name of its base weights, where it says
    row_ids: tuple[int, ...] = ()


def resolve_start(recipe: Recipe) -> Recipe:
    """Return the recipe with what `tune.start_from` decides filled in: ranks, targets and so on, where it gives none.

    A run that has started has them in its folder. Raises ValueError where they contradict what the recipe gives.
    """
    if recipe.tune.start_from is None:
        return recipe
    saved = run_dir(recipe) / _RECIPE_FILE
    if saved.is_file() and (there := load_recipe(saved).tune).start_from is not None:
        return _filled(recipe, there)
    source = _open_source(recipe)
    _check_same_form(recipe, source)
    return _filled(recipe, source.tune)


def check_start(recipe: Recipe, base: int) -> None:
    """Raise ValueError where `tune.start_from` was trained on other base weights. base: fingerprint of the recipe's."""
    source, path = _open_source(recipe), recipe.model.path
    theirs = source.base
    if isinstance(theirs, str) and os.path.isdir(theirs):
        theirs = WeightFiles(theirs).fingerprint()
    if isinstance(theirs, int) and theirs != base:
        raise ValueError(f"tune.start_from: {source.folder} was trained on other base weights than those of {path}")
    if isinstance(theirs, str):
        names = {Path(os.path.realpath(path)).name, Path(path).name, Path(recipe.model.public_name).name}
        if Path(theirs).name not in names and theirs.replace("/", "--") not in os.path.realpath(path):
            what = f"was trained on {theirs}, model.path is {path}; if that is the same, set model.hub_id to its name"
            raise ValueError(f"tune.start_from: {source.folder} {what}")


def load_start(recipe: Recipe, state: Mapping[str, Tensor]) -> str:
    """Read the weights of `tune.start_from` into the state of an engine, and return a line about it.

    state: of `TrainEngine.state_tensors`, written in place; what else trains keeps its values. Raises ValueError where
    the source holds what this recipe does not train, or trains in another shape. Every rank must call it.
    """
    source = _open_source(recipe)
    merge = f"merge it (launch/export.py {source.folder} --merge --out DIR) and give DIR as model.path"
    for name, shape in source.shapes.items():
        target = state.get(f"weight/{name}")
        if target is None:
            raise ValueError(
                f"tune.start_from: {source.folder} holds {name}, which this recipe does not train; add its group, or "
                f"{merge}"
            )
        if tuple(global_shape(target)) != shape:
            what = f"holds {name} in shape {shape}, here it is {tuple(global_shape(target))}"
            raise ValueError(f"tune.start_from: {source.folder} {what}; take the rank from there")
    wanted = {name: state[f"weight/{name}"] for name in source.shapes}
    if source.checkpoint is not None:
        load_weights(source.checkpoint, wanted)
    else:
        keys = _adapter_keys(source.folder)
        with torch.no_grad(), safe_open(source.folder / ADAPTER_WEIGHTS, framework="pt") as handle:
            for name, target in wanted.items():
                values = handle.get_tensor(keys[name]).float()
                if is_new_rows(name):  # here in the order of their ids
                    values = values[sorted(range(len(values)), key=source.row_ids.__getitem__)]
                copy_local_shard(target, values)
    fresh = len([name for name in state if name.startswith("weight/")]) - len(wanted)
    more = f"; {fresh} others start anew" if fresh else ""
    return f"starts from {source.checkpoint or source.folder}: weights of {len(wanted)} tensors{more}"


def _filled(recipe: Recipe, there: LoraTune | FullTune) -> Recipe:
    if recipe.tune.method != there.method:
        return recipe
    values, decided = recipe.to_dict(), there.model_dump(mode="json")
    given = recipe.tune.model_fields_set
    values["tune"] |= {key: decided[key] for key in _DECIDED if key in decided and key not in given}
    return recipe_from_dict(values, where=f"recipe {recipe.name}, with what tune.start_from decides")


def _check_same_form(recipe: Recipe, source: _Source) -> None:
    """Raise ValueError where the recipe gives an adapter another scale or form than it was trained with."""
    here, there = recipe.tune, source.tune
    if not (isinstance(here, LoraTune) and isinstance(there, LoraTune)):
        return
    groups = {group_of(name) for name in source.shapes if ".lora_" in name}
    for field in ("rank", "alpha", "rslora", "dora"):
        ours, theirs = getattr(here, field), getattr(there, field)
        by_number = field in ("rank", "alpha")
        differs = any(number_of(ours, g) != number_of(theirs, g) for g in groups) if by_number else ours != theirs
        if field in here.model_fields_set and differs:
            what = f"{ours}, but {source.folder} was trained with {theirs}"
            raise ValueError(f"tune.{field}: {what}; remove it here, or give the same")
    if "new_tokens" in here.model_fields_set and here.new_tokens != there.new_tokens and there.new_tokens is not None:
        what = f"{here.new_tokens}, but {source.folder} was trained with {there.new_tokens}"
        raise ValueError(f"tune.new_tokens: {what}; remove it here, or give the same")


def _open_source(recipe: Recipe) -> _Source:
    assert recipe.tune.start_from is not None
    folder = Path(recipe.tune.start_from)
    if (folder / _RECIPE_FILE).is_file():
        return _open_run(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(folder, recipe.model.path)
    if (folder / "config.json").is_file():
        raise ValueError(f"tune.start_from: {folder} is a full checkpoint; give it as model.path")
    what = "holds no run and no adapter" if folder.is_dir() else "is not a folder"
    raise ValueError(f"tune.start_from: {folder} {what}; give runs/<name> or a folder with {ADAPTER_CONFIG}")


def _open_run(folder: Path) -> _Source:
    recipe, checkpoint = load_recipe(folder / _RECIPE_FILE), latest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"tune.start_from: {folder} has no checkpoint yet; let that run save one")
    base = read_manifest(checkpoint).get("base", recipe.model.path)
    return _Source(folder, recipe.tune, stored_weights(checkpoint), checkpoint, base)


def _open_adapter(folder: Path, model_path: str) -> _Source:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: not JSON ({error}); copy the file again") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"tune.start_from: {folder} is {config.get('peft_type')}, only LORA can be continued")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        what = f"began with init_lora_weights {start}, which changed its base; convert it to plain LoRA with peft"
        raise ValueError(f"tune.start_from: {folder} {what}")
    keys = _adapter_keys(folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as handle:
        shapes = {name: tuple(handle.get_slice(key).get_shape()) for name, key in keys.items()}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLArch.from_pretrained(model_path))
    rows = config.get("trainable_token_indices") or []
    ids = tuple(rows if isinstance(rows, list) else next(iter(rows.values())))
    if isinstance(rows, dict) and any(tuple(of_table) != ids for of_table in rows.values()):
        raise ValueError(f"tune.start_from: {folder} has other tokens of the head than of the embedding; merge it")
    added = _added_tokens(Path(model_path) / "tokenizer.json") if ids else {}
    if unknown := [token for token in ids if token not in added]:
        raise ValueError(f"tune.start_from: {folder} trains rows {unknown[:5]}, no added tokens of {model_path}")
    tune = _tune_of(folder, config, shapes, model, [added[token] for token in ids])
    return _Source(folder, tune, shapes, None, config.get("base_model_name_or_path"), ids)


def _adapter_keys(folder: Path) -> dict[str, str]:
    """Return the keys of an adapter's file by our names. Raises ValueError for a tensor that is none of LoRA's."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"tune.start_from: {folder} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as handle:
        stored = list(handle.keys())
    keys: dict[str, str] = {}
    for key in stored:
        stem = key.removeprefix(PREFIX)
        part = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(\.default)?(\.weight)?", stem)
        rows = re.fullmatch(rf"(.+)\.{re.escape(TOKEN_ROWS)}(\.default)?", stem)
        whole = f"{rows[1]}.new_rows" if rows else stem.replace(".modules_to_save.default.", ".")
        name = from_huggingface(part[1] if part else whole)
        if name is None:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {key} is not of an adapter of Qwen3-VL")
        keys[f"{name}.lora_{part[2]}.{ADAPTER}.weight" if part else name] = key
    # The tied head is the embedding's own parameter here.
    if {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= keys.keys():
        head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as handle:
            if torch.equal(handle.get_tensor(keys[head]), handle.get_tensor(keys[embedding])):
                del keys[head]
    return keys


def _added_tokens(file: Path) -> dict[int, str]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return {token["id"]: token["content"] for token in content.get("added_tokens", [])}


def _tune_of(
    folder: Path,
    config: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    new_tokens: list[str],
) -> LoraTune:
    """Return the fields of `tune` that say what an adapter is."""
    ranks = {name.partition(".lora_")[0]: shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    numbers: dict[str, dict[str, int]] = {"rank": {}, "alpha": {}}
    for module, rank in ranks.items():
        group, alpha = group_of(module), _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        for field, number in (("rank", rank), ("alpha", alpha)):
            if numbers[field].setdefault(group, number) != number:
                what = f"{field} {number} and {numbers[field][group]} within {group}, which a recipe cannot say"
                raise ValueError(f"tune.start_from: {folder} has {what}; merge it and give that as model.path")
    whole = {name for name in shapes if not is_adapter(name)}
    full = [group for group in GROUPS if any(group_of(name) == group for name in whole)]
    fields = {field: _one_or_by_group(by_group) for field, by_group in numbers.items()}
    flags = {"rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora"))}
    targets = _targets(set(ranks), model)
    return LoraTune(**fields, **flags, targets=targets, full=full, new_tokens=new_tokens or None)  # type: ignore[arg-type]


def _by_pattern(config: dict[str, Any], field: str, module: str, default: int) -> int:
    """Return what peft finds for a module: patterns match the end of its name."""
    name = to_huggingface(module)
    matching = (n for key, n in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)


def _one_or_by_group(numbers: dict[str, int]) -> int | dict[str, int]:
    return next(iter(numbers.values())) if len(set(numbers.values())) == 1 else numbers


def _targets(adapted: set[str], model: nn.Module) -> list[str]:
    """Return groups, then expressions over all layers, then names that together select exactly these modules."""
    targets: list[str] = []
    left = set(adapted)
    names = {module: to_huggingface(module) for module in sorted(adapted)}
    candidates = [*LORA_GROUPS]
    candidates += dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names.values())
    candidates += map(re.escape, names.values())
    for candidate in candidates:
        hits = set(lora_modules(model, [candidate]))
        if hits <= adapted and hits & left:
            targets.append(candidate)
            left -= hits
    return targets
