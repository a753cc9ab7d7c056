"""Open the files beside the weights of an export with transformers, and compare ids and pixels with ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.tokenizer import IMAGE_PAD
from qwen3vl_train.data.media.budgets import Size
from qwen3vl_train.train.export.verify import picture

# transformers resizes with torchvision as we do, or without it with Pillow, which rounds in between: up to 12 of 255
# levels apart in single values. Another mean or scale moves all of them.
_LARGEST, _MEAN = 0.1, 3e-3
_MOST_TOKENS = 256
_SIDES = ((192, 160), (24, 40), (4096, 2048), (640, 16))
"""Width and height of pictures: ordinary, tiny, large, and a strip."""


def compare_processing(folder: Path, out: Path, collate: MultimodalCollator) -> None:
    """Compare ids, pixels and sizes of pictures. out: what messages call the folder.

    Raises RuntimeError where transformers cannot open a file, or processes anything in another way.
    """
    # Limits of a sample are not those of a picture, and no file of transformers has them.
    budgets = replace(collate.budgets, max_tokens_per_sample=None, max_image_pixels=None)
    collate = replace(collate, budgets=budgets, max_tokens=None, max_patches=None)
    try:
        _compare_ids(folder, collate)
        _compare_pixels(folder, collate)
        _compare_clips(folder, collate)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:  # what transformers raises for files
        raise RuntimeError(f"{out}: not written; transformers cannot read it ({error}); please report it") from error
    except _Difference as difference:
        raise RuntimeError(f"{out}: not written; transformers {difference}; please report it") from None


class _Difference(Exception):
    pass


def _compare_ids(folder: Path, collate: MultimodalCollator) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    added = "".join(list(collate.tokenizer.added_tokens.values())[:_MOST_TOKENS])
    turns = [("Größe? 12,345 \n", "It is\n  3."), (f"a {added} b", f"{added}\n")]
    messages = [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]
    for count in range(1, len(messages) + 1):
        prompt = count % 2 == 1
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        ours = collate.encode({"messages": messages[:count]}, generation_prompt=prompt).input_ids.tolist()
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            place = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if len(set(pair)) > 1), len(ours))
            around = [
                collate.decode(ids[max(0, place - 2) : place + 3], skip_special_tokens=False) for ids in (theirs, ours)
            ]
            raise _Difference(f"reads a text as other tokens: {around[0]!r} where we have {around[1]!r}")
    if tokenizer.convert_tokens_to_ids(IMAGE_PAD) != collate.tokenizer.special_ids[IMAGE_PAD]:
        raise _Difference(f"has another id for {IMAGE_PAD}")


def _compare_pixels(folder: Path, collate: MultimodalCollator) -> None:
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    for width, height in _SIDES:
        ours = collate.budgets.grid(Size(height, width))
        patches = processor.get_number_of_image_patches(height, width, {})
        if patches != ours[1] * ours[2]:
            raise _Difference(
                f"makes {patches} patches of a picture of {width} x {height}, we make {ours[1] * ours[2]}"
            )
    image = picture()
    made = processor(images=image, return_tensors="pt")
    batch = collate([_shown(image)])
    if made["image_grid_thw"].tolist() != batch.grid_thw.tolist():
        raise _Difference(
            f"makes {made['image_grid_thw'].tolist()} patches of a picture, not {batch.grid_thw.tolist()}"
        )
    difference = (made["pixel_values"].float() - _normalised(batch.pixel_values)).abs()
    if not (difference.max() <= _LARGEST and difference.mean() <= _MEAN):
        raise _Difference(f"makes other pixels of a picture, apart by up to {difference.max():.3f}")


def _shown(image: Image.Image) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]}


def _normalised(patches: Tensor) -> Tensor:
    """(P, 768) uint8 -> (P, 1536): both frames of a still, as transformers has them."""
    return (patches.float().view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536) - 127.5) / 127.5


def _compare_clips(folder: Path, collate: MultimodalCollator) -> None:
    """Compare the settings of clips. transformers opens their processor only where torchvision is installed."""
    from transformers import AutoVideoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    rules = collate.budgets.clips
    if rules is None or not is_torchvision_available():
        return
    processor: Any = AutoVideoProcessor.from_pretrained(folder, local_files_only=True)
    size = dict(processor.size)
    theirs = (processor.fps, processor.min_frames, processor.max_frames, size["shortest_edge"], size["longest_edge"])
    if theirs != tuple(rules):
        raise _Difference(f"reads the settings of clips as {theirs}, we used {tuple(rules)}")
