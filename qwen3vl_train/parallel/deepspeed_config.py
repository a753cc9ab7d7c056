"""DeepSpeed's settings from the recipe, and what a user's own JSON file may say beside it."""

import json
from pathlib import Path
from typing import Any

from qwen3vl_train.config import Recipe
from qwen3vl_train.config.rules import RecipeError

DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
# Elements that travel at once, and so the size of a buffer: 256 MiB of float32. DeepSpeed's own 5e8 take 2 GB each.
BUCKET_ELEMENTS = 2**26
# Sections that would change the training, or would not be used, and where the recipe says the same thing.
REFUSED = {
    "scheduler": "the schedule is optim.schedule",
    "activation_checkpointing": "it is train.activation_checkpointing",
    "amp": "precision is model.dtype",
    "elasticity": "sizes are train.packs_per_step",
    "autotuning": "sizes are train.packs_per_step",
    "data_efficiency": "data is planned by this program",
    "curriculum_learning": "data is planned by this program",
    "tensor_parallel": "all ranks share the data",
    "pipeline": "all ranks share the data",
    "expert_parallel": "the model has no experts",
    "compression_training": "the model is trained as it is",
    "zero_optimization.zenflow": "steps would be taken with old gradients",
}


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Everything that `deepspeed.initialize` is told: the user's file, if any, and over it what the recipe decides.

    Raises RecipeError that lists each key of the file that says something else than the recipe, with both values.
    """
    stage = recipe.parallel.zero_stage
    given: dict[str, Any] = {}
    path = recipe.parallel.deepspeed_config
    if path is not None:
        given = _read(Path(path))
        errors = _conflicts(given, recipe, world_size)
        if errors:
            raise RecipeError(path, errors)
    for section in ("optimizer", "bfloat16", "fp16", "train_batch_size", "torch_autocast"):
        given.pop(section, None)
    zero: dict[str, Any] = {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    zero |= {**given.get("zero_optimization", {}), "stage": stage}
    for field, wanted in (
        ("offload_optimizer", recipe.parallel.offload_optimizer),
        ("offload_param", recipe.parallel.offload_parameters),
    ):
        zero[field] = {**(zero.get(field) or {}), "device": "cpu"} if wanted else None
    return {
        "steps_per_print": None,
        **given,
        # One pack a pass; the training step says which pass is the last of a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the step scales the gradients itself, by the same factor with every engine
        # The loss is already divided by the labels of all ranks. Stage 3 can only average; that is undone after it.
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "communication_data_type": DTYPE_NAMES[recipe.parallel.reduce_dtype],
        "data_types": {**given.get("data_types", {}), "grad_accum_dtype": "fp32"},
        "bf16": {**given.get("bf16", {}), "enabled": recipe.model.dtype == "bfloat16"},
        # torch's fused AdamW, on the CPU as well: the same arithmetic as the other engines, and nothing to compile.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _read(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{path}: {twice[0]} is given twice; keep one of them")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise ValueError(f"parallel.deepspeed_config: {path} does not exist; give a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a JSON file that can be read ({error}); mend or replace it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; a DeepSpeed configuration is an object of keys")
    return _without_auto(content)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says "auto": transformers' way to say that the trainer decides, which it does."""
    kept = {key: value for key, value in section.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _conflicts(given: dict[str, Any], recipe: Recipe, world_size: int) -> list[str]:
    flat = _flat(given)
    errors = []
    for key, why in REFUSED.items():
        section = flat.get(key, {name: value for name, value in flat.items() if name.startswith(f"{key}.")})
        if section not in ({}, None, False) and flat.get(f"{key}.enabled") is not False:
            errors.append(f"{key}: cannot be set here, {why}; take it out")
    decided = _decided(recipe, world_size)
    for key in flat:
        if key.startswith("optimizer.") and key not in decided:
            errors.append(f"{key}: cannot be set here, the optimizer is the recipe's; take it out")
    for key, (wanted, where) in decided.items():
        if key in flat and flat[key] != wanted:
            got, said = json.dumps(flat[key]), json.dumps(wanted)
            errors.append(f"{key}: {got}, but the recipe says {said} ({where}); take it out or make them agree")
    return errors


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _decided(recipe: Recipe, world_size: int) -> dict[str, tuple[Any, str]]:
    """What the recipe decides: DeepSpeed's dotted key -> (value, field of the recipe)."""
    optim, parallel, packs = recipe.optim, recipe.parallel, recipe.train.packs_per_step
    bf16 = recipe.model.dtype == "bfloat16"
    dtype, packs_field = "model.dtype", "train.packs_per_step"
    return {
        "train_batch_size": (packs, packs_field),
        "train_micro_batch_size_per_gpu": (1, "one pack a pass"),
        "gradient_accumulation_steps": (packs // world_size, f"{packs_field} over {world_size} ranks"),
        "managed_gradient_accumulation": (True, packs_field),
        "gradient_allreduce_op": ("sum" if parallel.zero_stage < 3 else "mean", "gradients are summed over ranks"),
        "prescale_gradients": (False, "gradients are summed over ranks"),
        "gradient_predivide_factor": (1.0, "gradients are summed over ranks"),
        "gradient_clipping": (optim.max_grad_norm or 0.0, "optim.max_grad_norm"),
        "optimizer.type": ("AdamW", "optim"),
        "optimizer.params.lr": (optim.lr, "optim.lr"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (optim.eps, "optim.eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
        "bf16.enabled": (bf16, dtype),
        "bfloat16.enabled": (bf16, dtype),
        "bf16.bf16_master_weights_and_grads": (False, "masters are float32"),
        "bf16.bf16_optimizer_states": (False, "moments are float32"),
        "fp16.enabled": (False, dtype),
        "torch_autocast.enabled": (False, dtype),
        "communication_data_type": (DTYPE_NAMES[parallel.reduce_dtype], "parallel.reduce_dtype"),
        "data_types.param_dtype": (DTYPE_NAMES[recipe.model.dtype], dtype),
        "data_types.grad_accum_dtype": ("fp32", "gradients are summed in float32"),
        "sequence_parallel_size": (1, "all ranks share the data"),
        "zero_optimization": ({"stage": parallel.zero_stage}, "parallel.zero_stage"),  # the old form, true or false
        "zero_optimization.stage": (parallel.zero_stage, "parallel.zero_stage"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if parallel.offload_optimizer else "none",
            "parallel.offload_optimizer",
        ),
        "zero_optimization.offload_param.device": (
            "cpu" if parallel.offload_parameters else "none",
            "parallel.offload_parameters",
        ),
        "zero_optimization.zero_quantized_gradients": (False, "parallel.reduce_dtype"),
    }
