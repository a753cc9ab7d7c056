import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.config import Recipe
from qwen3vl_train.config.rules import RecipeError
from qwen3vl_train.parallel.deepspeed.config import BUCKET_ELEMENTS, deepspeed_config
from tests.helpers import engine_runs


def _recipe(folder: Path, content: Any = None, **overrides: Any) -> Recipe:
    if content is not None:
        (folder / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        overrides["deepspeed_config"] = str(folder / "ds.json")
    return engine_runs.engine_recipe(folder, engine_runs.FULL, "deepspeed", **overrides)


def _errors(folder: Path, content: Any, world_size: int = 2, **overrides: Any) -> list[str]:
    with pytest.raises(RecipeError) as error:
        deepspeed_config(_recipe(folder, content, **overrides), world_size)
    assert error.value.where == str(folder / "ds.json")
    return error.value.errors


def test_recipe_alone(tmp_path: Path):
    config = deepspeed_config(_recipe(tmp_path, zero_stage=2, dtype="bfloat16", offload_optimizer=True), 2)
    assert config == {
        "steps_per_print": None,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum",
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": None,
        },
    }


def test_file_that_agrees_is_used_unchanged(tmp_path: Path):
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 7,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": "auto"}},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0},
        "wall_clock_breakdown": False,
        "comms_logger": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": 10,
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
    }
    config = deepspeed_config(_recipe(tmp_path, content, zero_stage=3, offload_parameters=True), 2)
    assert "optimizer" not in config
    assert config["steps_per_print"] == 7
    assert config["comms_logger"] == {"enabled": False}
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_allreduce_op"] == "mean"
    assert config["data_types"] == {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []}
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": 10,
        "offload_optimizer": None,
        "offload_param": {"device": "cpu", "pin_memory": True},
    }


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b`, 1 -> {"a": {"b": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "of_recipe"),
    [
        ("train_batch_size", 16, "8 (train.packs_per_step)"),
        ("gradient_accumulation_steps", 8, "4 (train.packs_per_step over 2 ranks)"),
        ("gradient_clipping", 0.5, "1.0 (optim.max_grad_norm)"),
        ("bf16.enabled", True, "false (model.dtype)"),
        ("fp16.enabled", True, "false (model.dtype)"),
        ("zero_optimization.stage", 1, "2 (parallel.zero_stage)"),
        ("zero_optimization.offload_optimizer.device", "nvme", '"none" (parallel.offload_optimizer)'),
        ("optimizer.params.lr", 3e-5, "0.001 (optim.lr)"),
        ("optimizer.type", "Lion", '"AdamW" (optim)'),
        ("zero_force_ds_cpu_optimizer", True, "false (the optimizer is torch's AdamW)"),
        ("zero_optimization.zero_hpz_partition_size", 8, "1 (all ranks hold one copy)"),
        ("communication_data_type", "bf16", '"fp32" (parallel.reduce_dtype)'),
    ],
)
def test_contradiction_to_the_recipe_is_an_error(key: str, value: Any, of_recipe: str, tmp_path: Path):
    error = f"{key}: {json.dumps(value)}, but the recipe says {of_recipe}; remove it or make them agree"
    assert _errors(tmp_path, _nested(key, value)) == [error]


COPIES = "all ranks hold one copy; several copies are engine fsdp2 with parallel.replicate"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("scheduler", {"type": "WarmupLR"}, "the schedule is optim.schedule"),
        ("activation_checkpointing", {"partition_activations": True}, "it is train.activation_checkpointing"),
        ("optimizer.params.amsgrad", True, "the optimizer is the recipe's"),
        ("zero_optimization.zero_quantized_weights", True, "weights travel in model.dtype"),
        ("zero_optimization.mics_shard_size", 8, COPIES),
        ("zero_optimization.cpu_offload", True, "it is parallel.offload_optimizer"),
        ("sparse_gradients", True, "gradients are dense"),
        ("progressive_layer_drop", {"enabled": True, "theta": 0.5}, "the model is trained as it is"),
        ("hybrid_engine", {"enabled": True}, "nothing is generated by it"),
        ("eigenvalue", {"enabled": True}, "the model is trained as it is"),
        ("compile", {"deepcompile": True}, "the model is not compiled"),
    ],
)
def test_key_without_effect_is_an_error(key: str, value: Any, why: str, tmp_path: Path):
    assert _errors(tmp_path, _nested(key, value)) == [f"{key}: cannot be set here, {why}; remove it"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation (did you mean zero_optimization?)"),
        ({"gradient_clip": 1.0, "blue": 1}, "gradient_clip (did you mean gradient_clipping?), blue"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_keys_that_are_not_checked_are_named_in_one_warning(content: dict, named: str, tmp_path: Path):
    with pytest.warns(UserWarning, match="not checked") as warned:
        config = deepspeed_config(_recipe(tmp_path, content), 2)
    assert config.items() >= content.items()
    (warning,) = warned
    what = "not checked, and DeepSpeed ignores names that it does not know"
    assert str(warning.message) == f"{tmp_path / 'ds.json'}: {what}: {named}"


def test_deepspeed_itself_refuses_unknown_keys_of_zero():
    """Found in its sources, not by an import, which would ask a compiler about every operator."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("deepspeed is not installed")
    runtime = Path(spec.origin).parent / "runtime"
    assert "class DeepSpeedZeroConfig(DeepSpeedConfigModel)" in (runtime / "zero" / "config.py").read_text()
    assert 'extra="forbid"' in (runtime / "config_utils.py").read_text()


def test_optimizer_is_offloaded_completely_or_not_at_all(tmp_path: Path):
    content = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}
    assert _errors(tmp_path, content, offload_optimizer=True) == [
        "zero_optimization.offload_optimizer.ratio: 0.3, but the recipe says 1.0 (parallel.offload_optimizer is all or "
        "nothing); remove it or make them agree"
    ]


def test_all_conflicts_are_listed_at_once(tmp_path: Path):
    content = {"scheduler": {"type": "WarmupLR"}, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}
    keys = [error.partition(":")[0] for error in _errors(tmp_path, content)]
    assert keys == ["scheduler", "gradient_clipping", "zero_optimization.stage"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"bf16": {}, "bf16": {}}', "ds.json: bf16 is given twice; keep one of them"),
        ("{", "ds.json: not a JSON file that can be read"),
        ("[1]", "ds.json: holds a list; a DeepSpeed configuration is an object of keys"),
    ],
)
def test_file_that_cannot_be_used(content: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        deepspeed_config(_recipe(tmp_path, content), 2)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"parallel\.deepspeed_config: no/ds\.json does not exist; give a JSON file"):
        deepspeed_config(_recipe(tmp_path, deepspeed_config="no/ds.json"), 2)
