"""Qwen3-VL for training: vision tower, the one place where vision meets text, decoder, loss.

T packed tokens, D text hidden, M merged vision rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen3vl_train.arch import Qwen3VLArch, VisionArch
from qwen3vl_train.batch import PackedBatch, VisionIndex, VisionSlice, slice_rows
from qwen3vl_train.model.attention import Attention, PackedAttention
from qwen3vl_train.model.loss import cross_entropy_loss
from qwen3vl_train.model.text import Qwen3VLTextForCausalLM
from qwen3vl_train.model.vision import Qwen3VLVisionModel, VisionOutput

# By their names in recipes and in config.json.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VisionInjection(NamedTuple):
    """What `process_vision_slices` returns: (T, D), filled; (T,) bool, True at filled tokens; (M, D) of each layer."""

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
) -> VisionInjection:
    """Put merged features and their DeepStack rows at the tokens that slices name, in any order of the rows.

    inputs_embeds is (T, D), features and each of deepstack_features are (rows, D). Returns new tensors. Raises
    ValueError where slices overlap, leave their sequence or name features that do not exist. Training does not call
    this: `PackedBatch` has checked its slices and its features lie in token order.
    """
    token_rows, feature_rows = slice_rows(sequence_lengths, vision_slices_per_seq, inputs_embeds.shape[0])
    if feature_rows.numel() and int(feature_rows.max()) >= features.shape[0]:
        raise ValueError(f"vision slices: name feature row {int(feature_rows.max())} of {features.shape[0]}")
    token_rows, feature_rows = token_rows.to(inputs_embeds.device), feature_rows.to(inputs_embeds.device)
    mask = torch.zeros(inputs_embeds.shape[0], dtype=torch.bool, device=inputs_embeds.device)
    return VisionInjection(
        inputs_embeds=inject_vision(inputs_embeds, features.index_select(0, feature_rows), token_rows),
        visual_pos_mask=mask.index_fill(0, token_rows, True),
        deepstack_layers=[layer.index_select(0, feature_rows) for layer in deepstack_features],
        vision_token_count=token_rows.numel(),
    )


def inject_vision(text_TD: Tensor, vision_MD: Tensor, visual_rows_M: Tensor) -> Tensor:
    """Return text_TD with row i of vision_MD at token visual_rows_M[i]."""
    return text_TD.index_copy(0, visual_rows_M, vision_MD.to(text_TD.dtype))


class Qwen3VisionEncoder(nn.Module):
    def __init__(self, arch: VisionArch) -> None:
        super().__init__()
        self.vision = Qwen3VLVisionModel(arch)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, index: VisionIndex | None = None) -> VisionOutput:
        return self.vision(pixel_values, grid_thw, index)


class _ZeroOf(torch.autograd.Function):
    """Return zero, with a zero gradient for each input. Multiplying by zero would keep what is not finite."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class Qwen3VLForConditionalGeneration(nn.Module):
    """Qwen3-VL: `model(batch)` for training, `model.logits(batch)` for inspection. Knows nothing of ranks.

    always_run_vision: set by engines; run the vision side also for packs without images, which changes no result.
    """

    def __init__(self, arch: Qwen3VLArch) -> None:
        super().__init__()
        self.arch = arch
        self.always_run_vision = False
        self.visual = Qwen3VisionEncoder(arch.vision)
        self.language_model = Qwen3VLTextForCausalLM(arch.text, tie_word_embeddings=arch.tie_word_embeddings)

    def hidden_states(self, batch: PackedBatch, attention: Attention | None = None) -> Tensor:
        """Return the normed hidden states (T, D) of a pack; by default with causal attention inside each sequence."""
        text = self.language_model.model
        x_TD = text.embed_tokens(batch.input_ids)
        deepstack: list[Tensor] = []
        if batch.num_patches:
            vision = self.visual(batch.pixel_values, batch.grid_thw, batch.vision)
            x_TD = inject_vision(x_TD, vision.pooler_output, batch.visual_rows)
            deepstack = vision.deepstack_features
        elif self.always_run_vision:
            x_TD = x_TD + self._dummy_vision_forward(x_TD)
        attention = attention or PackedAttention(batch.segments, causal=True)
        return text(x_TD, batch.positions, attention, deepstack_visual_embeds=deepstack, visual_rows=batch.visual_rows)

    def _dummy_vision_forward(self, like: Tensor) -> Tensor:
        """Run the vision side on four grey patches and return a zero that depends on all of it.

        Ranks that share the vision side's weights or gradients exchange them in every forward and backward pass. A rank
        whose pack holds no image has to take part, or the others wait forever.
        """
        merge = self.arch.vision.spatial_merge_size
        grid_thw = torch.tensor([[1, merge, merge]])
        pixels = torch.full((merge * merge, self.arch.vision.patch_dim), 127, dtype=torch.uint8, device=like.device)
        # Adapters' dropout here must not shift that of the pack.
        with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            vision = self.visual(pixels, grid_thw)
        zero: Tensor = _ZeroOf.apply(vision.pooler_output, *vision.deepstack_features)  # type: ignore[assignment]
        return zero.to(like.dtype)

    def forward(self, batch: PackedBatch, loss_function: Callable[..., Any] | None = None) -> Any:
        """Return (sum of the losses of all labels, float32 scalar; number of labels), see `cross_entropy_loss`.

        loss_function: compute this instead, from (hidden_TD, head_VD, batch); its result is returned.
        """
        arguments = self.hidden_states(batch), self.language_model.head_weight(), batch
        return loss_function(*arguments) if loss_function else cross_entropy_loss(*arguments)[:2]

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """Return all logits, (T, V) float32. For inspection; training never builds them."""
        return self.language_model.logits(self.hidden_states(batch)).float()
