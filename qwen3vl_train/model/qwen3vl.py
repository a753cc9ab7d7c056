"""Qwen3-VL for training: vision tower, the one place where vision meets text, decoder, loss.

T packed tokens, D text hidden, M merged vision rows, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen3vl_train.arch import Qwen3VLArch, VisionArch
from qwen3vl_train.batch import PackedBatch, VisionIndex, VisionSlice, placed_rows
from qwen3vl_train.model.attention import KVCache
from qwen3vl_train.model.loss import linear_cross_entropy_sum
from qwen3vl_train.model.text import Qwen3VLTextForCausalLM
from qwen3vl_train.model.vision import Qwen3VLVisionModel, VisionOutput


class VisionInjection(NamedTuple):
    """inputs_embeds (T, D) with features in place; visual_pos_mask (T,).

    Deepstack_layers, each (M, D) in token order.
    """

    inputs_embeds: Tensor
    visual_pos_mask: Tensor
    deepstack_layers: list[Tensor]
    vision_token_count: int


def process_vision_slices(
    inputs_embeds: Tensor,
    sequence_lengths: list[int],
    vision_slices_per_seq: list[list[VisionSlice]],
    features: Tensor,
    deepstack_features: list[Tensor],
    *,
    rows: tuple[Tensor, Tensor] | None = None,
) -> VisionInjection:
    """Put the merged features and their DeepStack rows at the tokens that the slices name.

    inputs_embeds (T, D); features and each of deepstack_features (rows, D). rows: (token_rows, feature_rows) of
    `placed_rows` when the collator has computed them; otherwise they are made from the slices, on the host. Returns new
    tensors. Raises ValueError where slices overlap, leave their sequence or name features that do not exist.
    """
    if rows is None:
        token_rows, feature_rows = placed_rows(sequence_lengths, vision_slices_per_seq, inputs_embeds.shape[0])
        if feature_rows.numel() and int(feature_rows.max()) >= features.shape[0]:
            raise ValueError(f"vision slices: name feature row {int(feature_rows.max())} of {features.shape[0]}")
        rows = token_rows.to(inputs_embeds.device), feature_rows.to(inputs_embeds.device)
    token_rows, feature_rows = rows
    mask = torch.zeros(inputs_embeds.shape[0], dtype=torch.bool, device=inputs_embeds.device)
    mask = mask.index_fill(0, token_rows, True)
    placed = features.index_select(0, feature_rows).to(inputs_embeds.dtype)
    return VisionInjection(
        inputs_embeds=inputs_embeds.index_copy(0, token_rows, placed),
        visual_pos_mask=mask,
        deepstack_layers=[layer.index_select(0, feature_rows) for layer in deepstack_features],
        vision_token_count=token_rows.numel(),
    )


class Qwen3VisionEncoder(nn.Module):
    def __init__(self, arch: VisionArch) -> None:
        super().__init__()
        self.vision = Qwen3VLVisionModel(arch)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, index: VisionIndex | None = None) -> VisionOutput:
        return self.vision(pixel_values, grid_thw, index)


class _ZeroOf(torch.autograd.Function):
    """Zero, and a gradient of zero for each input. Times zero would not do: what is not finite would stay so."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class Qwen3VLForConditionalGeneration(nn.Module):
    """`model(batch)` for training, `model.logits(batch)` for looking. Plain torch: knows nothing of ranks.

    always_run_vision, set from outside: run the vision side also for a pack without images, to no effect on the result.
    """

    def __init__(self, arch: Qwen3VLArch) -> None:
        super().__init__()
        self.arch = arch
        self.always_run_vision = False
        self.visual = Qwen3VisionEncoder(arch.vision)
        self.language_model = Qwen3VLTextForCausalLM(arch.text, tie_word_embeddings=arch.tie_word_embeddings)

    def hidden_states(self, batch: PackedBatch, cache: KVCache | None = None) -> Tensor:
        """Normed hidden states (T, D) of a pack; fills the cache when one is given."""
        text = self.language_model.model
        inputs_embeds = text.embed_tokens(batch.input_ids)
        if batch.num_patches == 0:
            if self.always_run_vision:
                inputs_embeds = inputs_embeds + self._vision_of_nothing(inputs_embeds)
            return text(inputs_embeds, batch.positions, batch.segments, cache=cache)
        vision = self.visual(batch.pixel_values, batch.grid_thw, batch.vision)
        injected = process_vision_slices(
            inputs_embeds,
            list(batch.segments.lengths),
            batch.vision_slices_per_seq,
            vision.pooler_output,
            vision.deepstack_features,
            rows=(batch.visual_rows, batch.feature_rows),
        )
        return text(
            injected.inputs_embeds,
            batch.positions,
            batch.segments,
            visual_pos_mask=injected.visual_pos_mask,
            deepstack_visual_embeds=injected.deepstack_layers,
            visual_rows=batch.visual_rows,
            cache=cache,
        )

    def _vision_of_nothing(self, like: Tensor) -> Tensor:
        """A zero that came through the whole vision side: four grey patches that lead to nothing.

        Ranks that share the vision side's weights or gradients exchange them in every forward and backward pass. A rank
        whose pack holds no image has to take part, or the others wait for ever.
        """
        merge = self.arch.vision.spatial_merge_size
        grid_thw = torch.tensor([[1, merge, merge]])
        pixels = torch.full((merge * merge, self.arch.vision.patch_dim), 127, dtype=torch.uint8, device=like.device)
        devices = [like.device] if like.is_cuda else []
        with torch.random.fork_rng(devices=devices):  # adapters' dropout here must not shift that of the pack
            vision = self.visual(pixels, grid_thw)
        zero: Tensor = _ZeroOf.apply(vision.pooler_output, *vision.deepstack_features)  # type: ignore[assignment]
        return zero.to(like.dtype)

    def forward(self, batch: PackedBatch, losses_R: Tensor | None = None) -> tuple[Tensor, int]:
        """Return (sum of the losses of all labels, float32 scalar; number of labels). Only labelled rows reach the
        head.

        loss_weights multiply the losses; they do not change the number of labels. losses_R: float32, one place for each
        of `batch.label_rows`, is filled with the terms of the sum, without gradient.
        """
        hidden_RD = self.hidden_states(batch).index_select(0, batch.label_rows)
        labels_R = batch.labels.index_select(0, batch.label_rows)
        weights_R = None if batch.loss_weights is None else batch.loss_weights.index_select(0, batch.label_rows)
        head_VD = self.language_model.lm_head.weight
        loss_sum = linear_cross_entropy_sum(hidden_RD, head_VD, labels_R, weights_R, losses_R)
        return loss_sum, batch.num_labels

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """All logits, (T, V) float32. For looking at the model; training never builds them."""
        return self.language_model.lm_head(self.hidden_states(batch)).float()
