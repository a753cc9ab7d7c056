"""What the tests compare with: random checkpoints of stock transformers, its inputs, sample conversations.

Nothing here imports the package: what it is compared against must not depend on it.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoint
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ORACLE_TAPS = {24: (5, 11, 17), 27: (8, 16, 24)}


def oracle_checkpoint(folder: Path, *, vision_depth: int = 24, tie: bool = True, dialect: str = "published") -> Path:
    """Write a random checkpoint in which every mistake shows, saved by stock transformers; return `folder`.

    vision_depth: 24 or 27, with the released DeepStack taps; 27 has a theta and an epsilon of its own. Widths all
    differ (q width is not the hidden size, vision head dim is 16 or 24), the position table is 48x48, norms and biases
    are random. dialect: 'saved' leaves config.json as transformers 5 writes it, 'published' replaces it with the form
    of the released files. Tokenizer, template and pixel limits beside it are in published form: an image costs 4 to
    100 tokens.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_checkpoint.build_tokenizer(tiny_checkpoint.default_texts(), 512)
    published = tiny_checkpoint.tiny_config(
        tokenizer,
        hidden_size=80,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vision_hidden_size=32 if vision_depth == 24 else 48,
        vision_depth=vision_depth,
        vision_num_heads=2,
        num_position_embeddings=2304,
        deepstack_visual_indexes=ORACLE_TAPS[vision_depth],
        tie_word_embeddings=tie,
    )
    if vision_depth == 27:  # not the released numbers, which code could hold instead of reading them
        published["text_config"].update(rope_theta=1_000_000, rms_norm_eps=1e-5)
    file = folder / "config.json"
    file.write_text(json.dumps(published))
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder)).float()
    randomise(model, seed=0)
    model.save_pretrained(folder)
    if dialect == "published":
        file.write_text(json.dumps(published, indent=2))
    tiny_checkpoint.write_processor_files(folder, tokenizer, min_pixels=64 * 64, max_pixels=320 * 320)
    return folder


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that shows when it is skipped, swapped or misread.

    Matrices keep the scale of what passes through them (std 1/sqrt(fan-in)), but for those that feed the residual
    stream of the vision tower: it stays small, so that a wrong epsilon in a norm moves the logits by 1e-3. Norms lie
    around 1, biases around 0; tables are small enough to leave the logits a std of one to two.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.05 * noise if name.endswith(".bias") else 1 + 0.2 * noise)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.copy_(0.15 * noise)
            elif name.endswith("pos_embed.weight"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
                if name.endswith(("patch_embed.proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")):
                    parameter.mul_(0.2)


def oracle(folder: Path, *, attention: str = "sdpa") -> Any:
    """Load the folder as stock transformers does: float32, eval mode. attention: 'sdpa' or 'eager'."""
    from transformers import Qwen3VLForConditionalGeneration

    options = {"dtype": torch.float32, "attn_implementation": attention, "local_files_only": True}
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, **options).eval()


def oracle_pixels(folder: Path, image: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
    """Prepare one picture as transformers does with torchvision: (P, 1536) float32 and its grid (t, h, w) in patches.

    All steps are transformers' own but the resize: torchvision's is torch's antialiased bicubic on uint8, and calling
    that gives the same bytes without torchvision, which has no build for a CPU-only torch on the package index.
    """
    from transformers import AutoImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    rgb_HWC = torch.from_numpy(np.array(processor.convert_to_rgb(image)))
    limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
    size = smart_resize(*rgb_HWC.shape[:2], factor=processor.patch_size * processor.merge_size, **limits)
    resized = F.interpolate(rgb_HWC.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True)[0]
    out = processor(Image.fromarray(resized.permute(1, 2, 0).numpy()), do_resize=False, return_tensors="pt")
    frames, height, width = out["image_grid_thw"][0].tolist()
    return out["pixel_values"], (frames, height, width)


def images_of(messages: list[dict[str, Any]]) -> Iterator[Image.Image]:
    """Yield the pictures of a conversation in their order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def oracle_inputs(folder: Path, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Prepare ONE conversation (pictures as PIL images) for the stock model: a batch of one row, no padding.

    Returns input_ids, attention_mask and mm_token_type_ids (1, T), and where there are pictures pixel_values (P, 1536)
    and image_grid_thw (N, 3). Markup typed in a text becomes special tokens, as it does in transformers.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pixels, grids, text = [], [], ""
    pieces = tokenizer.apply_chat_template(messages, tokenize=False).split("<|image_pad|>")
    for piece, image in zip(pieces[:-1], images_of(messages), strict=True):
        patches, grid = oracle_pixels(folder, image)
        pixels.append(patches)
        grids.append(grid)
        text += piece + "<|image_pad|>" * (len(patches) // 4)
    tokenized = tokenizer(text + pieces[-1], return_tensors="pt")
    inputs = {key: tokenized[key] for key in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    return inputs


def _scene(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with some grain, so that resizing and every patch matter."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-24, 25, (height, width, 3))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def sample_images() -> dict[str, Image.Image]:
    """Pictures of several sizes, shapes and modes, the same on every call. Sizes are width x height."""
    return {name: image.copy() for name, image in draw_images().items()}


@cache
def draw_images() -> dict[str, Image.Image]:
    ramp = Image.linear_gradient("L")
    translucent = _scene(100, 70, 5)
    translucent.putalpha(ramp.resize((100, 70)))
    see_through = _scene(80, 80, 8).quantize(16)
    see_through.info["transparency"] = 3
    return {
        "exact": _scene(64, 64, 0),
        "wide": _scene(200, 90, 1),
        "tall": _scene(72, 176, 2),
        "large": _scene(500, 333, 3),
        "tiny": _scene(20, 11, 4),
        "strip": _scene(640, 16, 6),
        "grey": _scene(96, 64, 7).convert("L"),
        "two_tone": _scene(64, 96, 9).convert("1"),
        "palette": _scene(90, 60, 10).quantize(32),
        "palette_transparent": see_through,
        "rgba": translucent,
        "grey_alpha": translucent.convert("LA"),
    }


def _image(name: str) -> dict[str, Any]:
    return {"type": "image", "image": draw_images()[name].copy()}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def conversations() -> dict[str, dict[str, Any]]:
    """Named samples {"messages": [...]}; pictures are PIL images inside the content, as in `sample_images`."""
    samples = {
        "one_image": _turns([_image("exact"), _text("Which digit is this?")], "7"),
        "several_sizes": _turns(
            [_image("wide"), _text("Compare the first image with"), _image("tall"), _text("and with"), _image("large")],
            "The first one is the brighter one.",
        ),
        "text_only": _turns("Say yes or no.", "No, it isn't."),
        "many_turns": _turns(
            [_text("What is in this picture?"), _image("tall")],
            "A wall, and the sea.",
            "Are you sure?",
            [_text("Yes, "), _text("it is.")],
            [_image("tiny"), _image("grey"), _text("And what of these two?")],
            "odd, seven\n\neven, two",
        ),
        "system": [
            {"role": "system", "content": [_text("Answer in few words.")]},
            *_turns([_text("Read the table: "), _image("wide"), _text(" what was the value for March?")], "12.5"),
        ],
        "extreme_aspect": _turns([_image("strip"), _text("Is the left half bright?")], "Yes, it is."),
        "modes": _turns(
            [_image("rgba"), _image("palette"), _image("grey_alpha"), _image("two_tone"), _text("Größe? 数字?")], "4"
        ),
    }
    return {name: {"messages": messages} for name, messages in samples.items()}


def checkpoint_all(model, mode: str = "full") -> None:
    for block in [*model.visual.vision.blocks, *model.language_model.model.layers]:
        block.checkpointing = mode
