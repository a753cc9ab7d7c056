"""FLOPs of one training step on a pack, counted as useful work: no padding, no recomputation.

A linear layer costs 2 * rows * in * out forward, as much again for the gradient of its input where something below it
trains, and as much again for the gradient of its weight where that trains. Attention costs twice its forward more where
gradients pass. The head runs on label rows only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.modules import VISION_GROUPS, grouped_parameters

_MERGERS, _DECODER = ("merger", "deepstack"), ("text_attn", "text_mlp")


@dataclass(frozen=True)
class FlopsCounter:
    """How many times its forward cost each module group's linear layers pay in a step, from what trains; built once.

    linear: by module group; the head's is `lm_head`. attention: of the vision tower and of the decoder. adapters:
    number of adapter elements in the vision tower, the mergers and the decoder.
    """

    arch: Qwen3VLArch
    linear: dict[str, int]
    attention: tuple[int, int]
    adapters: tuple[int, int, int]

    @classmethod
    def from_model(
        cls, model: nn.Module, arch: Qwen3VLArch, num_elements: Callable[[nn.Parameter], int] = nn.Parameter.numel
    ) -> "FlopsCounter":
        """Read from requires_grad which parts train, and from the parameter names where adapters sit.

        num_elements: of a whole parameter, where the model holds pieces that do not say it themselves.
        """
        groups = grouped_parameters(model)
        trains = {group: any(p.requires_grad for _, p in members) for group, members in groups.items()}
        weight = {
            group: any(p.requires_grad and ".lora_" not in name for name, p in members)
            for group, members in groups.items()
        }
        weight["lm_head"] |= arch.tie_word_embeddings and weight["text_embed"]

        def adapters(*names: str) -> int:
            return sum(num_elements(p) for group in names for name, p in groups[group] if ".lora_" in name)

        tower = any(trains[group] for group in VISION_GROUPS)
        mergers = any(trains[group] for group in _MERGERS)
        decoder = tower or mergers or any(trains[group] for group in ("text_embed", *_DECODER))
        passes = {
            "vision_embed": False,  # pixels need no gradient
            **dict.fromkeys(("vision_attn", "vision_mlp"), tower),
            **{merger: tower or trains[merger] for merger in _MERGERS},
            **dict.fromkeys(_DECODER, decoder),
            "lm_head": decoder or trains["lm_head"],  # the final norm is of the head's group
        }
        return cls(
            arch=arch,
            linear={group: 1 + below + weight[group] for group, below in passes.items()},
            attention=(3 if tower else 1, 3 if decoder else 1),
            adapters=(adapters(*VISION_GROUPS), adapters(*_MERGERS), adapters(*_DECODER)),
        )

    def step(self, batch: PackedBatch) -> float:
        """FLOPs of forward and backward over one pack."""
        vision, text = self.arch.vision, self.arch.text
        patches, merged, tokens = batch.num_patches, batch.num_visual_tokens, batch.num_tokens
        joined = vision.hidden_size * vision.spatial_merge_size**2
        q_dim, kv_dim = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        one_merger = merged * joined * (joined + vision.out_hidden_size)
        # Multiply-adds of the linear layers, by module group.
        products = {
            "vision_embed": patches * vision.patch_dim * vision.hidden_size,
            "vision_attn": patches * vision.depth * 4 * vision.hidden_size**2,
            "vision_mlp": patches * vision.depth * 2 * vision.hidden_size * vision.intermediate_size,
            "merger": one_merger,
            "deepstack": one_merger * len(vision.deepstack_visual_indexes),
            "text_attn": tokens * text.num_hidden_layers * text.hidden_size * 2 * (q_dim + kv_dim),
            "text_mlp": tokens * text.num_hidden_layers * text.hidden_size * 3 * text.intermediate_size,
            "lm_head": batch.num_labels * text.hidden_size * text.vocab_size,
        }
        frame_squares = sum(length**2 for length in batch.vision.segments.lengths)
        sequence_squares = sum(length**2 for length in batch.segments.lengths)
        of_vision = 4 * vision.hidden_size * vision.depth * frame_squares
        of_text = 2 * q_dim * text.num_hidden_layers * sequence_squares  # causal: half of the square
        rows_of_adapters = zip((patches, merged, tokens), self.adapters, strict=True)
        return float(
            sum(2 * count * self.linear[group] for group, count in products.items())
            + of_vision * self.attention[0]
            + of_text * self.attention[1]
            + sum(6 * rows * elements for rows, elements in rows_of_adapters)
        )
