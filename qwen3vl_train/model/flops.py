"""FLOPs of one training step on a pack, counted as useful work: no padding, no recomputation.

Linear layers cost 2 * rows * in * out forward; a trainable one three times that, a frozen one with a gradient passing
through it twice, one above which nothing trains once. Attention costs 3 times its forward wherever gradients pass. The
head runs on label rows only.
"""

from dataclasses import dataclass

from torch import nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.model.groups import grouped_parameters
from qwen3vl_train.shards import shape_of


@dataclass(frozen=True)
class FlopsCounter:
    """How many times each part's forward cost a training step pays, from what trains; built once a run."""

    arch: Qwen3VLArch
    tower_linear: int
    tower_attention: int
    mergers_linear: int
    text_linear: int
    text_attention: int
    head: int
    adapter_elements_vision: int
    adapter_elements_merger: int
    adapter_elements_text: int

    @classmethod
    def of(cls, model: nn.Module, arch: Qwen3VLArch) -> "FlopsCounter":
        """Read from requires_grad which parts train, and from the parameter names where adapters sit."""
        groups = grouped_parameters(model)

        def trains(*names: str) -> bool:
            return any(p.requires_grad for name in names for _, p in groups.get(name, ()))

        def base_trains(*names: str) -> bool:
            return any(p.requires_grad and ".lora_" not in n for name in names for n, p in groups.get(name, ()))

        def adapter(*names: str) -> int:
            return sum(shape_of(p).numel() for name in names for n, p in groups.get(name, ()) if ".lora_" in n)

        tower, mergers = ("vision_embed", "vision_attn", "vision_mlp"), ("merger", "deepstack")
        text = ("text_attn", "text_mlp")
        in_tower, in_mergers = trains(*tower), trains(*mergers)
        # Gradients reach the decoder's first layer when anything at or below it trains; they always pass through it
        # then.
        in_text = trains(*text, "text_embed") or in_tower or in_mergers

        def times(base: bool, passes: bool) -> int:
            return 3 if base else 2 if passes else 1

        return cls(
            arch=arch,
            tower_linear=times(base_trains(*tower), in_tower),
            tower_attention=3 if in_tower else 1,
            mergers_linear=times(base_trains(*mergers), in_tower or in_mergers),
            text_linear=times(base_trains(*text), in_text),
            text_attention=3 if in_text else 1,
            head=times(base_trains("lm_head", "text_embed"), in_text or trains("lm_head")),
            adapter_elements_vision=adapter(*tower),
            adapter_elements_merger=adapter(*mergers),
            adapter_elements_text=adapter(*text),
        )

    def step(self, batch: PackedBatch) -> float:
        """FLOPs of forward and backward over one pack."""
        vision, text = self.arch.vision, self.arch.text
        patches, merged = batch.num_patches, batch.num_visual_tokens
        tokens, rows = batch.num_tokens, batch.num_labels
        frame_squares = sum(length**2 for length in batch.vision.segments.lengths)
        sequence_squares = sum(length**2 for length in batch.segments.lengths)
        joined = vision.hidden_size * vision.spatial_merge_size**2
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        tower = 2 * patches * (vision.patch_dim * vision.hidden_size + vision.depth * block)
        tower_attention = 4 * vision.hidden_size * vision.depth * frame_squares
        num_mergers = 1 + len(vision.deepstack_visual_indexes)
        mergers = 2 * merged * num_mergers * (joined**2 + joined * vision.out_hidden_size)
        q_dim, kv_dim = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        layer = text.hidden_size * (2 * q_dim + 2 * kv_dim + 3 * text.intermediate_size)
        decoder = 2 * tokens * text.num_hidden_layers * layer
        decoder_attention = 2 * q_dim * text.num_hidden_layers * sequence_squares  # causal: half of the square
        head = 2 * rows * text.hidden_size * text.vocab_size
        adapters = 6 * (
            patches * self.adapter_elements_vision
            + merged * self.adapter_elements_merger
            + tokens * self.adapter_elements_text
        )
        return float(
            tower * self.tower_linear
            + tower_attention * self.tower_attention
            + mergers * self.mergers_linear
            + decoder * self.text_linear
            + decoder_attention * self.text_attention
            + head * self.head
            + adapters
        )
