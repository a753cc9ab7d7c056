"""The model computes what stock transformers computes, from the same pictures and words, in float32 on the CPU."""

import pytest
import torch

from qwen3vl_train.batch import IGNORE_LABEL
from qwen3vl_train.model.hf_names import to_huggingface
from tests.helpers import oracles

KINDS = list(oracles.conversations())
# Noise of float32 between two orders of summation is 1e-5 in logits with a std of 1.3. The smallest mistake known, a
# norm with epsilon 1e-5 for 1e-6, moves them by 1e-3 or more.
LOGITS = 2e-4
# The same noise is 1e-6 in a loss of 7, and that mistake 1e-4.
LOSS = 1e-5
# Of the norm of each gradient: the noise is 1e-5, that mistake 1e-3.
GRADIENT = 1e-4
# Vision features have a std of 1 or less: the noise is 7e-6, that mistake 1e-3.
FEATURES = 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same(oracle_folder, stock, collate, kind):
    messages = oracles.conversations()[kind]["messages"]
    batch, inputs = collate([{"messages": messages}]), oracles.oracle_inputs(oracle_folder, messages)
    grids = inputs.get("image_grid_thw")
    positions, _ = stock.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], grids)
    assert batch.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(batch.positions, positions[:, 0])
    assert torch.equal(batch.visual_pos_mask, inputs["mm_token_type_ids"][0].bool())
    if grids is None:
        assert batch.num_patches == 0
        assert batch.grid_thw.shape == (0, 3)
        return
    assert batch.grid_thw.tolist() == grids.tolist()
    assert batch.pixel_values.dtype == torch.uint8
    pixels = (batch.pixel_values.float() - 127.5) / 127.5
    both_frames = pixels.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536)
    # transformers' PIL class rescales and normalises in two steps, which costs it the last bit; the bytes are the same.
    torch.testing.assert_close(both_frames, inputs["pixel_values"], atol=2e-7, rtol=0)
    assert torch.equal((both_frames * 127.5 + 127.5).round(), (inputs["pixel_values"] * 127.5 + 127.5).round())


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text_only"])
def test_vision_and_deepstack_features(oracle_folder, ours, stock, collate, kind):
    messages = oracles.conversations()[kind]["messages"]
    batch, inputs = collate([{"messages": messages}]), oracles.oracle_inputs(oracle_folder, messages)
    mine = ours.visual(batch.pixel_values, batch.grid_thw, batch.vision)
    theirs = stock.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, atol=FEATURES, rtol=0)
    torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, atol=FEATURES, rtol=0)
    assert len(mine.deepstack_features) == len(theirs.deepstack_features) == 3
    for layer, (feature, expected) in enumerate(zip(mine.deepstack_features, theirs.deepstack_features, strict=True)):
        torch.testing.assert_close(
            feature, expected, atol=FEATURES, rtol=0, msg=lambda text, k=layer: f"tap {k}: {text}"
        )


@torch.no_grad()
def test_clips_are_attended_frame_by_frame(ours, stock):
    grids = torch.tensor([[2, 8, 12], [1, 4, 6], [3, 4, 4]])  # two clips around a still
    patches = torch.randint(0, 256, (2 * 96 + 24 + 3 * 16, 1536), generator=torch.Generator().manual_seed(1))
    mine = ours.visual(patches.to(torch.uint8), grids)
    theirs = stock.model.visual((patches.float() - 127.5) / 127.5, grids)
    torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, atol=FEATURES, rtol=0)
    torch.testing.assert_close(mine.deepstack_features[2], theirs.deepstack_features[2], atol=FEATURES, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits(oracle_folder, ours, stock, collate, kind):
    messages = oracles.conversations()[kind]["messages"]
    mine = ours.logits(collate([{"messages": messages}]))
    theirs = stock(**oracles.oracle_inputs(oracle_folder, messages), use_cache=False).logits[0]
    assert mine.dtype == torch.float32
    assert theirs.std() > 0.5, "logits this flat would hide a mistake"
    torch.testing.assert_close(mine, theirs, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient(oracle_folder, ours, stock, collate, kind):
    messages = oracles.conversations()[kind]["messages"]
    batch, inputs = collate([{"messages": messages}]), oracles.oracle_inputs(oracle_folder, messages)
    loss_sum, num_labels = ours(batch)
    # Ours name the next token at each position; transformers takes the token itself and shifts.
    labels = torch.cat([torch.tensor([IGNORE_LABEL]), batch.labels[:-1]])
    stock.zero_grad(set_to_none=True)
    loss = stock(**inputs, labels=labels[None], use_cache=False).loss
    mean = loss_sum / num_labels
    assert num_labels == (labels != IGNORE_LABEL).sum() > 0
    assert abs(mean.item() - loss.item()) <= LOSS
    mean.backward()
    loss.backward()
    mine = {to_huggingface(name): parameter.grad for name, parameter in ours.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert set(mine) == set(theirs)
    without_gradient = {name for name, gradient in theirs.items() if gradient is None}
    assert {name for name, gradient in mine.items() if gradient is None} == without_gradient
    assert bool(without_gradient) == (kind == "text_only")
    errors = {
        name: ((mine[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in theirs.items()
        if gradient is not None
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT, f"{worst}: relative error {errors[worst]:.1e}"


@torch.no_grad()
def test_a_pack_of_everything_gives_the_logits_of_each_alone(oracle_folder, ours, stock, collate):
    samples = list(oracles.conversations().values())
    batch = collate(samples)
    pieces = ours.logits(batch).split(batch.segments.lengths)
    for sample, piece in zip(samples, pieces, strict=True):
        theirs = stock(**oracles.oracle_inputs(oracle_folder, sample["messages"]), use_cache=False).logits[0]
        torch.testing.assert_close(piece, theirs, atol=LOGITS, rtol=0)
