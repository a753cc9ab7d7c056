"""Quantised checkpoints are refused in one line at the start; plain weights of three dtypes are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.checkpoint.hf import WeightFiles, load_qwen3_vl_model
from tests.helpers.messages import message_of

REMEDY = "give the bfloat16 checkpoint that it was made from"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "base")


def _projections(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    weights = load_file(folder / "model.safetensors")
    return weights, [name for name in weights if name.endswith("_proj.weight")]


def _save(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _configure(folder: Path, section: str | None, settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scales", [True, False], ids=["scales", "no-scales"])
@pytest.mark.parametrize("section", [None, "text_config"])
def test_an_fp8_checkpoint_is_refused(folder, section, scales):
    weights, names = _projections(folder)
    for name in names:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        if scales:
            weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    _save(folder, weights)
    _configure(folder, section, {"quant_method": "fp8"})
    message = f"{folder}: quantised (fp8, stored as F8_E4M3), which cannot be trained here; {REMEDY}"
    assert message_of(ValueError, WeightFiles, folder) == message


def test_a_dtype_without_its_scales_is_refused_by_name(folder):
    weights, names = _projections(folder)
    _save(folder, {**weights, names[0]: weights[names[0]].to(torch.float8_e4m3fn)})
    assert message_of(ValueError, WeightFiles, folder) == (
        f"{folder}: 1 weights are stored as F8_E4M3, {names[0]} among them; "
        f"only float32, bfloat16, float16 are read, {REMEDY}"
    )


@pytest.mark.parametrize(
    ("added", "method"),
    [(".absmax", "bitsandbytes"), (".qweight", "awq or gptq"), (".weight_packed", "compressed-tensors")],
)
def test_packed_weights_are_refused_in_one_line(folder, added, method):
    weights, names = _projections(folder)
    stem = names[0].removesuffix(".weight")
    weights[(names[0] if added == ".absmax" else stem) + added] = torch.zeros(4, dtype=torch.uint8)
    _save(folder, weights)
    message = message_of(ValueError, WeightFiles, folder)
    assert message == f"{folder}: quantised ({method}, stored as U8), which cannot be trained here; {REMEDY}"
    _configure(folder, None, {"quant_method": "theirs"})
    assert "quantised (theirs, stored as U8)" in message_of(ValueError, WeightFiles, folder)


@pytest.mark.parametrize(("section", "key"), [(None, ""), ("text_config", "text_config.")])
def test_settings_left_over_are_refused_with_their_key(folder, section, key):
    _configure(folder, section, {"quant_method": "bitsandbytes"})
    assert message_of(ValueError, WeightFiles, folder) == (
        f"{folder / 'config.json'}: {key}quantization_config says bitsandbytes, but the weights are plain float32; "
        f"take {key}quantization_config out"
    )
    _configure(folder, section, None)
    WeightFiles(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read(folder, dtype):
    weights, _ = _projections(folder)
    _save(folder, {name: weight.to(dtype) for name, weight in weights.items()})
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    read = model.language_model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(read, weights["model.language_model.layers.0.self_attn.q_proj.weight"].to(dtype).float())
