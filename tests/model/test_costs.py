"""The formula against PyTorch's own count of the operations that ran, matrix products and attention apart.

A multiply and an add are two in both. The formula charges what the mathematics of each part needs, which differs from
what runs in few known points; each test corrects these and then compares exactly:
- causal attention is charged half of its square, while the counter charges all;
- attention's backward is charged twice its forward, while the fused kernel makes the scores again: 2.5 times;
- the patch embedding is charged for two frames, though the one of a still is sent once;
- a layer is charged for the gradient of its input where anything in or below its part trains, though the first layer of
  what trains may make none.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen3vl_train.model.costs import FlopsCounter
from qwen3vl_train.model.lora import AdapterSize, add_lora, lora_modules
from qwen3vl_train.model.selection import train_whole
from tests.helpers import oracles

ATEN = torch.ops.aten


def _attention_forward(q_shape, *_args, out_shape=None, **_options) -> int:
    batch, heads, length, head_dim = q_shape
    return 4 * batch * heads * length**2 * head_dim


def _attention_backward(_gradient_shape, q_shape, *_args, out_shape=None, **_options) -> int:
    return 5 * _attention_forward(q_shape) // 2


def _addmm(_self_shape, a_shape, b_shape, *_args, out_shape=None, **_options) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


# What the counter does not know yet.
MORE_OPS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ATEN.addmm_: _addmm,
}


def counted(model, batch) -> tuple[int, int]:
    """FLOPs of one step as they ran: (matrix products, attention)."""
    with FlopCounterMode(display=False, custom_mapping=MORE_OPS) as counter:
        loss, _ = model(batch)
        if loss.requires_grad:
            loss.backward()
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in by_op.items() if "attention" in op)
    return sum(by_op.values()) - attention, attention


def one_pass(model, batch) -> tuple[int, int, int]:
    """FLOPs of one forward pass of vision attention, of causal text attention, and of the patch embedding."""
    vision, text = model.arch.vision, model.arch.text
    frames = sum(length**2 for length in batch.vision.segments.lengths)
    sequences = sum(length**2 for length in batch.segments.lengths)
    return (
        4 * vision.hidden_size * vision.depth * frames,
        2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * sequences,
        2 * batch.num_patches * vision.patch_dim * vision.hidden_size,
    )


@pytest.fixture
def batch(small_collate):
    samples = oracles.conversations()
    return small_collate([samples[kind] for kind in ("several_sizes", "text_only", "many_turns")])


def test_nothing_trains(small, batch):
    small.requires_grad_(False)
    matrix, attention = counted(small, batch)
    vision, text, patch_embed = one_pass(small, batch)
    assert attention == vision + 2 * text
    assert FlopsCounter.from_model(small, small.arch).step(batch) == matrix + patch_embed / 2 + vision + text


def test_everything_trains(small, batch):
    train_whole(small, ["all"], "tune.train")
    matrix, attention = counted(small, batch)
    vision, text, patch_embed = one_pass(small, batch)
    assert attention == 3.5 * (vision + 2 * text)
    # Forward and weight gradient of one frame of a still instead of two.
    assert FlopsCounter.from_model(small, small.arch).step(batch) == matrix + patch_embed + 3 * (vision + text)


def test_the_main_merger_alone_trains(small, batch):
    small.requires_grad_(False)
    train_whole(small, ["merger"], "tune.train")
    matrix, _ = counted(small, batch)
    vision, text, patch_embed = one_pass(small, batch)
    # Its norm is its first trained tensor, so both of its layers make gradients of their inputs; DeepStack's none.
    assert FlopsCounter.from_model(small, small.arch).step(batch) == matrix + patch_embed / 2 + vision + 3 * text


def test_adapters_on_the_text(small, batch):
    rank, arch = 4, small.arch.text
    modules = lora_modules(small, ["text_attn", "text_mlp"])
    add_lora(small, dict.fromkeys(modules, AdapterSize(rank, 8)), dropout=0.0, rslora=False, dora=False)
    matrix, attention = counted(small, batch)
    vision, text, patch_embed = one_pass(small, batch)
    assert attention == vision + 3.5 * 2 * text
    # The embedding is frozen: the first layer's q, k and v, and the adapters beside them, make no gradient of it.
    qkv_width = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
    first_input = 2 * batch.num_tokens * arch.hidden_size * (qkv_width + 3 * rank)
    step = FlopsCounter.from_model(small, small.arch).step(batch)
    assert step == matrix + patch_embed / 2 + first_input + vision + 3 * text


def test_text_alone_costs_no_vision(small, small_collate):
    batch = small_collate([oracles.conversations()["text_only"]])
    small.requires_grad_(False)
    matrix, _ = counted(small, batch)
    vision, text, patch_embed = one_pass(small, batch)
    assert vision == patch_embed == 0
    assert FlopsCounter.from_model(small, small.arch).step(batch) == matrix + text


def test_activation_checkpointing_is_not_charged(small, batch):
    counter = FlopsCounter.from_model(small, small.arch)
    before, (matrix, _) = counter.step(batch), counted(small, batch)
    oracles.checkpoint_all(small)
    assert counted(small, batch)[0] > matrix
    assert FlopsCounter.from_model(small, small.arch).step(batch) == before
