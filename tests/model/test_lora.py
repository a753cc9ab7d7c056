"""LoRA: which modules it adapts, that it trains, that merging changes nothing, and that the stock model agrees."""

from typing import Any

import pytest
import torch

from qwen3vl_train import MultimodalCollator
from qwen3vl_train.checkpoint.adapter import adapter_tensors
from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import AdapterSize, add_lora, lora_modules, merge_lora
from qwen3vl_train.modules import LORA_GROUPS
from tests.helpers import oracles

EVERYWHERE = list(LORA_GROUPS)


def adapt(model: torch.nn.Module, targets: list[str], *, rslora: bool = False, dora: bool = False) -> list[str]:
    """Add an adapter of rank 4 whose every tensor is random, so that it matters."""
    modules = lora_modules(model, targets)
    sizes = dict.fromkeys(modules, AdapterSize(4, 2))
    add_lora(model, sizes, dropout=0.0, rslora=rslora, dora=dora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.1 * noise)
                else:
                    parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return modules


def hugging_names(model: torch.nn.Module, *targets: str) -> list[str]:
    return [to_huggingface(name) for name in lora_modules(model, targets)]


def test_targets_by_group(small):
    visual, text, layers = "model.visual", "model.language_model.layers", range(4)
    assert {group: hugging_names(small, group) for group in LORA_GROUPS} == {
        "vision_attn": [f"{visual}.blocks.{k}.attn.{part}" for k in layers for part in ("qkv", "proj")],
        "vision_mlp": [f"{visual}.blocks.{k}.mlp.linear_fc{n}" for k in layers for n in (1, 2)],
        "merger": [f"{visual}.merger.linear_fc{n}" for n in (1, 2)],
        "deepstack": [f"{visual}.deepstack_merger_list.{k}.linear_fc{n}" for k in range(3) for n in (1, 2)],
        "text_attn": [f"{text}.{k}.self_attn.{part}_proj" for k in layers for part in "qkvo"],
        "text_mlp": [f"{text}.{k}.mlp.{part}_proj" for k in layers for part in ("gate", "up", "down")],
    }
    assert hugging_names(small, "vision_attn", "vision_mlp") == hugging_names(small, "vision")


def test_all_means_every_linear_layer_but_the_head(small):
    linears = {name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(lora_modules(small, ["all"])) == linears - {"language_model.lm_head"}


def test_targets_by_regular_expression_match_the_whole_name(small):
    assert hugging_names(small, r".*\.layers\.[01]\.self_attn\.(q|v)_proj") == [
        f"model.language_model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv"
    ]
    both = hugging_names(small, r"model\.visual\.merger\.linear_fc1", "merger")
    assert both == ["model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("text_atn", r"tune\.targets: 'text_atn' matches no module; near names: text_attn"),
        ("q_proj", r"tune\.targets: 'q_proj' matches no module; near names: model\."),
        (".*lm_head", r"matches lm_head, which takes no adapter; only linear layers of vision_attn, .*, text_mlp do"),
        (r".*\.proj", r"matches model\.visual\.patch_embed\.proj, which takes no adapter"),
        (r".*norm1", r"matches model\.visual\.blocks\.0\.norm1, which takes no adapter"),
        (".*embed_tokens", r"matches model\.language_model\.embed_tokens, which takes no adapter"),
    ],
)
def test_targets_that_cannot_be(small, target, message):
    with pytest.raises(ValueError, match=message):
        lora_modules(small, ["text_attn", target])


def test_a_fresh_adapter_changes_nothing_and_alone_trains(small, small_collate):
    batch = small_collate([oracles.conversations()["one_image"]])
    before = small.logits(batch)
    modules = lora_modules(small, EVERYWHERE)
    add_lora(small, dict.fromkeys(modules, AdapterSize(4, 8)), dropout=0.0, rslora=False, dora=False)
    assert torch.equal(small.logits(batch), before)
    trained = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert trained == {f"{module}.lora_{part}.default.weight" for module in modules for part in "AB"}


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_every_adapter_gets_a_gradient(small, small_collate, checkpointing):
    # The vision tower's input has no gradient: reentrant checkpointing would silently leave its adapters without one.
    adapt(small, EVERYWHERE)
    oracles.checkpoint_all(small, checkpointing)
    loss, _ = small(small_collate([oracles.conversations()["several_sizes"]]))
    loss.backward()
    for name, parameter in small.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.any(), name


KINDS = pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["plain", "rslora", "dora"])


@KINDS
def test_merged_equals_unmerged(ours, collate, kind):
    batch = collate([oracles.conversations()["one_image"], oracles.conversations()["text_only"]])
    base = ours.logits(batch)
    names = set(dict(ours.named_parameters()))
    adapt(ours, EVERYWHERE, **kind)
    unmerged = ours.logits(batch)
    assert (unmerged - base).abs().max() > 0.5
    merge_lora(ours)
    assert set(dict(ours.named_parameters())) == names
    torch.testing.assert_close(ours.logits(batch), unmerged, atol=2e-4, rtol=0)  # as against transformers


@KINDS
def test_adapter_on_the_stock_model_agrees(make_oracle, tmp_path, kind):
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = make_oracle(vision_depth=24, tie=True, dialect="published")
    ours = load_qwen3_vl_model(folder, dtype=torch.float32)
    modules = adapt(ours, EVERYWHERE, **kind)
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(ours).items()}
    assert len(tensors) == len(modules) * (3 if "dora" in kind else 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        base_model_name_or_path=str(folder),
        r=4,
        lora_alpha=2,
        target_modules=[to_huggingface(name) for name in modules],
        use_rslora="rslora" in kind,
        use_dora="dora" in kind,
    ).save_pretrained(str(tmp_path))

    stock = PeftModel.from_pretrained(oracles.oracle(folder), str(tmp_path)).eval()
    assert set(get_peft_model_state_dict(stock)) == set(tensors)  # the names that peft itself would write
    collate = MultimodalCollator.from_pretrained(folder)
    for name in ("several_sizes", "text_only"):
        messages = oracles.conversations()[name]["messages"]
        inputs: dict[str, Any] = oracles.oracle_inputs(folder, messages)
        theirs = stock(**inputs, use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(collate([{"messages": messages}])), theirs, atol=2e-4, rtol=0)
