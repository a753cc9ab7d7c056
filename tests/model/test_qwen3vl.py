"""The model against itself: packing, checkpointing, what it builds and what it reads; and where vision meets text."""

import pytest
import torch

from qwen3vl_train.batch import VisionSlice
from qwen3vl_train.model.loss import linear_cross_entropy_sum
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration, inject_vision, process_vision_slices
from tests.helpers import oracles
from tests.helpers.dispatch import LargestTensor, SeesTensors


def weighted_samples() -> list[dict]:
    """Every kind of conversation, one with a weight on an answer and one with an answer that is not trained."""
    samples = oracles.conversations()
    samples["one_image"]["messages"][-1]["loss_weight"] = 2.5
    samples["many_turns"]["messages"][1]["loss"] = False
    return list(samples.values())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert mine.keys() == theirs.keys()
    return max(((mine[name] - theirs[name]).norm().item() / theirs[name].norm().item(), name) for name in theirs)


def test_a_pack_equals_its_samples(ours, collate):
    samples = weighted_samples()
    loss_alone, labels_alone = 0.0, 0
    for sample in samples:
        loss, num_labels = ours(collate([sample]))
        loss.backward()
        loss_alone, labels_alone = loss_alone + loss.item(), labels_alone + num_labels
    alone = gradients(ours)
    ours.zero_grad()
    batch = collate(samples)
    assert set(batch.label_weights.tolist()) == {1.0, 2.5}
    loss, num_labels = ours(batch)
    loss.backward()
    assert num_labels == labels_alone
    assert loss.item() == pytest.approx(loss_alone, rel=1e-6)  # float32 adds in another order
    error, name = largest_error(gradients(ours), alone)
    assert error <= 1e-5, name  # likewise; 2e-6 to 5e-6 are seen


def test_loss_weights_multiply_the_losses_and_not_the_count(small, small_collate):
    messages = oracles.conversations()["many_turns"]["messages"]
    plain, num_labels = small(small_collate([{"messages": messages}]))
    for message in messages[1::2]:
        message["loss_weight"] = 3.0
    weighted, num_weighted = small(small_collate([{"messages": messages}]))
    assert weighted.item() == pytest.approx(3 * plain.item(), rel=1e-6)
    assert num_weighted == num_labels


def test_forward_is_the_cross_entropy_of_the_logits(small, small_collate):
    batch = small_collate(weighted_samples())
    loss, _ = small(batch)
    losses = torch.nn.functional.cross_entropy(small.logits(batch), batch.labels, reduction="none")
    assert loss.item() == pytest.approx((losses * batch.loss_weights).sum().item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("trained", ["all", "mergers and text"])
def test_activation_checkpointing_changes_nothing(small, small_collate, trained, mode):
    tower, decoder = small.visual.vision, small.language_model.model
    if trained != "all":
        for parameter in tower.tower_parameters():
            parameter.requires_grad_(False)
    runs = {"tower": 0, "decoder": 0}
    tower.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.update(tower=runs["tower"] + 1))
    decoder.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.update(decoder=runs["decoder"] + 1))
    batch = small_collate(weighted_samples())
    loss_off, _ = small(batch)
    loss_off.backward()
    off = gradients(small)
    assert runs == {"tower": 1, "decoder": 1}
    small.zero_grad()
    oracles.checkpoint_all(small, mode)
    loss_on, _ = small(batch)
    loss_on.backward()
    assert runs == {"tower": 3 if trained == "all" else 2, "decoder": 3}  # once more, in backward; not where frozen
    assert torch.equal(loss_on, loss_off)
    on = gradients(small)
    assert on.keys() == off.keys()
    assert all(torch.equal(on[name], off[name]) for name in off)


class StaysOnDevice(SeesTensors):
    """Refuses any operation that returns a tensor on another device than the model's."""

    def see(self, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "meta", "an operation made a tensor on the host"


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_step_reads_nothing_back_from_the_device(small, small_collate, checkpointing):
    # Meta tensors have no values: whatever would wait for one (item, tolist, nonzero, a boolean index) raises.
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(small.arch)
    oracles.checkpoint_all(model, checkpointing)
    batch = small_collate(weighted_samples()).to("meta")
    with StaysOnDevice():
        loss, num_labels = model(batch)
        loss.backward()
    assert isinstance(num_labels, int)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(NotImplementedError):  # without the index the tower must read the grids back
        model.visual(batch.pixel_values, batch.grid_thw)


def test_a_step_builds_neither_all_logits_nor_a_mask(small, small_collate):
    text = " ".join(str(number) for number in range(200))
    sample = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}
    batch = small_collate([sample] * 3)
    with LargestTensor() as largest:
        loss, _ = small(batch)
        loss.backward()
    logits, mask = batch.num_tokens * small.arch.text.vocab_size, batch.num_tokens**2
    assert largest.elements == batch.num_tokens * small.arch.text.intermediate_size < logits < mask


def test_a_pack_without_labels_has_loss_zero_and_a_graph(small, small_collate):
    messages = oracles.conversations()["one_image"]["messages"]
    messages[-1]["loss"] = False
    loss, num_labels = small(small_collate([{"messages": messages}]))
    assert (loss.item(), num_labels) == (0.0, 0)
    loss.backward()
    assert not any(parameter.grad.any() for parameter in small.parameters() if parameter.grad is not None)


def test_in_bfloat16_the_loss_is_float32(small, small_collate):
    batch = small_collate(weighted_samples())
    exact, _ = small(batch)
    loss, num_labels = small.bfloat16()(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert small.language_model.model.norm.weight.grad.dtype == torch.bfloat16
    assert loss.item() / num_labels == pytest.approx(exact.item() / num_labels, rel=0.02)  # 8 bits of mantissa


# Where vision meets text


def test_slices_name_the_tokens_of_their_features():
    embeds, features = torch.zeros(8, 2), torch.arange(1.0, 9.0).view(4, 2)
    deepstack = [10 * features, 100 * features]
    slices = [[VisionSlice(offset=1, length=2, row=2)], [], [VisionSlice(0, 1, 1), VisionSlice(2, 1, 0)]]
    injected = process_vision_slices(embeds, [4, 1, 3], slices, features, deepstack)
    assert injected.inputs_embeds.tolist() == [[0, 0], [5, 6], [7, 8], [0, 0], [0, 0], [3, 4], [0, 0], [1, 2]]
    assert injected.visual_pos_mask.tolist() == [False, True, True, False, False, True, False, True]
    order = features[[2, 3, 1, 0]]
    assert [layer.tolist() for layer in injected.deepstack_layers] == [(10 * order).tolist(), (100 * order).tolist()]
    assert injected.vision_token_count == 4
    assert not embeds.any(), "the embeddings passed in must stay as they are"


def test_training_injects_as_slices_do(small, small_collate):
    batch = small_collate(weighted_samples())
    vision = small.visual(batch.pixel_values, batch.grid_thw, batch.vision)
    embeds = small.language_model.model.embed_tokens(batch.input_ids)
    lengths, slices = batch.sequence_lengths.tolist(), batch.vision_slices_per_seq
    injected = process_vision_slices(embeds, lengths, slices, vision.pooler_output, vision.deepstack_features)
    assert torch.equal(injected.inputs_embeds, inject_vision(embeds, vision.pooler_output, batch.visual_rows))
    assert torch.equal(injected.visual_pos_mask, batch.visual_pos_mask)
    for placed, feature in zip(injected.deepstack_layers, vision.deepstack_features, strict=True):
        assert torch.equal(placed, feature)


@pytest.mark.parametrize(
    ("lengths", "slices", "message"),
    [
        ([8], [[], []], "vision slices: 2 lists for 1 sequences; give one each"),
        ([5, 2], [[], []], "sequence_lengths: sum is 7 but the pack has 8 tokens"),
        ([4, 4], [[VisionSlice(2, 3, 0)], []], r"\(offset 2, length 3, row 0\) of sequence 0 .* leaves .* of 4 tokens"),
        ([8], [[VisionSlice(0, 3, 0), VisionSlice(2, 1, 3)]], r"\(offset 2, .* of sequence 0 overlaps"),
        ([8], [[VisionSlice(-1, 2, 0)]], r"\(offset -1, length 2, row 0\)"),
        ([8], [[VisionSlice(0, 0, 0)]], r"\(offset 0, length 0, row 0\)"),
        ([8], [[VisionSlice(0, 2, -1)]], r"\(offset 0, length 2, row -1\)"),
        ([8], [[VisionSlice(0, 2, 3)]], "vision slices: name feature row 4 of 4"),
    ],
)
def test_slices_that_cannot_be_are_refused(lengths, slices, message):
    with pytest.raises(ValueError, match=message):
        process_vision_slices(torch.zeros(8, 2), lengths, slices, torch.ones(4, 2), [])


def test_loss_takes_the_head_of_a_tied_model(small):
    # The chunked loss is given a weight, so the gradient of a tied head reaches the embedding it shares.
    head = small.language_model.lm_head.weight
    linear_cross_entropy_sum(torch.ones(2, head.shape[1]), head, torch.tensor([1, 2]), torch.ones(2))[0].backward()
    assert small.language_model.model.embed_tokens.weight.grad.abs().sum() > 0
