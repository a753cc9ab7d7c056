"""Compare an export with the trained model: logits of stock transformers, and peft, on probe conversations."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.train.build import as_trained

# Both sides compute in float32 from the same weights; what is left is the order of summation, 1e-5 on tiny models and
# growing with depth. A wrong scale, a missing module or another template moves logits by tenths of their standard
# deviation.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class LogitDifference:
    """Hold the largest difference of any logit over the probes, and the standard deviation of the logits for scale."""

    largest: float
    std: float

    @property
    def within_tolerance(self) -> bool:
        return self.largest <= TOLERANCE * self.std


def picture() -> Image.Image:
    """Return a small picture of ramps of colour."""
    ramp = torch.linspace(0, 255, 192)
    image = torch.stack([ramp.expand(160, -1), ramp.flip(0).expand(160, -1), ramp[:160, None].expand(-1, 192)], dim=-1)
    return Image.fromarray(image.to(torch.uint8).numpy())


def probe_batches(collate: MultimodalCollator, tokens: Sequence[str] = ()) -> list[PackedBatch]:
    """Return two small conversations, one with an image: together they use every module.

    tokens: names of added tokens, which a third one uses.
    """
    shown = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is shown?"}]
    turns: list[tuple[Any, str]] = [(shown, "Three ramps of colour."), ("Name a number.", "Seven.")]
    if tokens:
        turns.append(("Say them.", "".join(tokens[:64])))
    return [
        collate([{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}])
        for asked, answer in turns
    ]


@torch.no_grad()
def compare_with_transformers(
    logits: list[Tensor],
    batches: list[PackedBatch],
    *,
    checkpoint: Path,
    dtype: torch.dtype,
    adapter: Path | None,
    num_layers: int | None = None,
) -> LogitDifference:
    """Load `checkpoint` into the stock class in float32, add the adapter if there is one, and compare logits.

    logits: ours, (T, V) for each batch.
    dtype: what the run computed with; the base weights are rounded to it, as they were in training.
    num_layers: load so many decoder layers and no more.

    Raises RuntimeError where transformers finds the files incomplete.
    """
    from transformers import Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Stock

    config: Any = Qwen3VLConfig.from_pretrained(checkpoint)
    if num_layers is not None:
        config.text_config.num_hidden_layers = num_layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:num_layers]
    loaded: Any = Stock.from_pretrained(checkpoint, config=config, dtype=torch.float32, output_loading_info=True)
    stock, info = loaded
    left_over = [
        f"{kind}: {some[:3]}"
        for kind, names in info.items()
        if (some := sorted(name for name in names if not _is_later_layer(str(name), num_layers)))
    ]
    if left_over:
        raise RuntimeError(f"{checkpoint}: transformers does not load all of it ({'; '.join(left_over)})")
    as_trained(stock, dtype)
    if adapter is not None:
        from peft import PeftModel

        stock = PeftModel.from_pretrained(stock, str(adapter))
    stock.eval()
    largest, std = torch.zeros(()), torch.zeros(())
    for batch, ours in zip(batches, logits, strict=True):
        theirs = stock(**stock_inputs(batch, stock)).logits[0].float()
        largest = torch.maximum(largest, (theirs - ours).abs().max())  # keeps a NaN, which Python's max drops
        std = torch.maximum(std, theirs.std())
    return LogitDifference(largest.item(), std.item())


def _is_later_layer(name: str, num_layers: int | None) -> bool:
    layer = re.search(r"language_model\.layers\.(\d+)\.", name)
    return num_layers is not None and layer is not None and int(layer[1]) >= num_layers


def stock_inputs(batch: PackedBatch, stock: torch.nn.Module) -> dict[str, Tensor]:
    """Return a pack of one sequence as inputs of the stock class: normalised patches, both frames of a still."""
    inputs: dict[str, Tensor] = {"input_ids": batch.input_ids[None]}
    base = stock.get_base_model() if hasattr(stock, "get_base_model") else stock  # type: ignore[operator]
    if "mm_token_type_ids" in inspect.signature(base.forward).parameters:  # type: ignore[union-attr]
        inputs["mm_token_type_ids"] = batch.visual_pos_mask[None].int()
    if batch.num_patches:
        patches = batch.pixel_values.float()
        if patches.shape[1] == 768:
            patches = patches.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536)
        inputs |= {"pixel_values": (patches - 127.5) / 127.5, "image_grid_thw": batch.grid_thw}
    return inputs
