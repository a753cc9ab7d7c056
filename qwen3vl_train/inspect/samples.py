"""Show what the model sees of a row or a pack: images at their final size, every token, and which ones are trained."""

import base64
from collections.abc import Sequence
from io import BytesIO
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qwen3vl_train.batch import IGNORE_LABEL, PackedBatch
from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.encode.tokenizer import ChatTokenizer
from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.media.image import MERGE, PATCH
from qwen3vl_train.inspect.as_json import describe_sample
from qwen3vl_train.inspect.boxes import find_marks
from qwen3vl_train.inspect.facts import PackFacts, histogram
from qwen3vl_train.inspect.scan import Scan
from qwen3vl_train.inspect.training import Entry, RowRef, Training

_LOSSLESS_PIXELS = 128 * 128  # above this, JPEG: a page of large PNGs would be too heavy to open
_LONGEST_SIDE = 1600
_MOST_FRAMES = 16
_LONGEST_CHARACTER = 4  # tokens: a byte each


def choose_rows(entries: Sequence[Entry], scans: Sequence[Scan], num_samples: int) -> list[RowRef]:
    """Choose rows to show: one for each check that rows fail, the rest evenly from all entries in turn."""
    chosen: dict[RowRef, None] = {}
    shown: set[str] = set()
    for scan in scans:
        for ref, checks in scan.failed_checks.items():
            if len(chosen) < num_samples and not checks <= shown:
                chosen[ref] = None
                shown |= checks
    for refs in zip_longest(*(entry.evenly_spaced(num_samples) for entry in entries)):
        for ref in refs:
            if ref is not None and len(chosen) < num_samples:
                chosen[ref] = None
    return sorted(chosen)


def view_sample(entry: Entry, ref: RowRef, checks: frozenset[str], collate: MultimodalCollator) -> dict[str, Any]:
    """Encode one row as the loader will; return what there is to show, or its fault. checks: those that it fails."""
    name = f"{entry.name}:{entry.label(ref)}"
    view: dict[str, Any] = {"source": entry.name, "role": entry.role, "row": entry.label(ref), "fault": None}
    try:
        with LAST_RESORT:
            sample = entry.sample(ref)
            name = sample.sample_id
            encoded, listed = collate.encode(sample), entry.listed_marks(ref)
    except RowFault as fault:
        return {**view, "id": name, "fault": str(fault), "checks": sorted({*checks, "undecodable"})}
    tokens = view_tokens(encoded, collate.tokenizer)
    return {
        **view,
        "id": name,
        "checks": sorted(checks),
        "frames": view_frames(encoded),
        "marks": [mark._asdict() for mark in find_marks(sample, listed)],
        **tokens,
        **describe_sample(sample, encoded, tokens["texts"], collate),
    }


def view_tokens(encoded: EncodedSample, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return id, text, weight and position of every token. weight: 0 where the model is not trained to write it."""
    ids = encoded.input_ids.tolist()
    weights = [0.0] * len(ids)
    for row, weight in zip(encoded.label_rows.tolist(), encoded.label_weights.tolist(), strict=True):
        weights[row + 1] = weight  # a label is the token after its row
    special = set(tokenizer.special_ids.values())
    return {
        "ids": ids,
        "texts": token_texts(ids, tokenizer),
        "special": [position for position, token in enumerate(ids) if token in special],
        "weights": weights,
        "positions": encoded.positions.tolist(),
        "visual": [[slot.offset, slot.length] for slot in encoded.slices],
    }


def token_texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """Return the text of each token. A character of several tokens is the text of the first, the others are ''."""

    def decoded(first: int, last: int) -> str:
        return tokenizer.decode(list(ids[first:last]), skip_special_tokens=False)

    texts: list[str] = []
    start = 0
    while start < len(ids):
        end = start + 1
        text = decoded(start, end)
        if "\ufffd" in text:  # a part of a character, which ends where the rest decodes alone to the same text
            horizon = start + 2 * _LONGEST_CHARACTER
            ends = range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1)
            whole = decoded(start, horizon)
            end = next((end for end in ends if decoded(start, end) + decoded(end, horizon) == whole), start + 1)
            text = decoded(start, end)
        texts += [text, *[""] * (end - start - 1)]
        start = end
    return texts


def view_frames(encoded: EncodedSample) -> list[dict[str, Any]]:
    """Return the frames of a sample, evenly spaced ones of a long clip.

    Each has its medium and frame (from 0), size in pixels, tokens (rows x cols), first token, and a data URI.
    """
    slices = iter(encoded.slices)
    frames = []
    for medium, (count, height, width) in enumerate(encoded.grids):
        shown = {round(step * (count - 1) / max(1, min(count, _MOST_FRAMES) - 1)) for step in range(_MOST_FRAMES)}
        for frame in range(count):
            offset, length, row = next(slices)
            assert length == height * width // MERGE**2, f"slice of {length} tokens for {height}x{width} patches"
            if frame in shown:
                patches = encoded.patches[row * MERGE**2 : (row + length) * MERGE**2]
                frames.append(
                    {
                        "medium": medium,
                        "frame": frame,
                        "frames": count,
                        "width": width * PATCH,
                        "height": height * PATCH,
                        "rows": height // MERGE,
                        "cols": width // MERGE,
                        "offset": offset,
                        "src": data_uri(unpatch(patches, height, width)),
                    }
                )
    return frames


def unpatch(patches: Tensor, rows: int, cols: int) -> Image.Image:
    """Put the patches of one frame together: the inverse of `media.resize_to_patches`.

    patches: uint8 (rows * cols, 768), or (rows * cols, 1536) for a pair of frames, of which the first is shown.
    """
    still = patches.reshape(patches.shape[0], 3, -1, PATCH, PATCH)[:, :, 0]
    blocks = still.reshape(rows // MERGE, cols // MERGE, MERGE, MERGE, 3, PATCH, PATCH)
    pixels = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * PATCH, cols * PATCH, 3)
    return Image.fromarray(pixels.numpy())


def data_uri(image: Image.Image) -> str:
    """Encode a small image as PNG, a larger one as JPEG, shrunk to at most 1600 pixels a side."""
    small = image.width * image.height <= _LOSSLESS_PIXELS
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    out = BytesIO()
    image.save(out, format="PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"


def pack_facts(training: Training, recipe: Recipe) -> PackFacts:
    """Count the packs and their tokens."""
    packs = training.packs
    tokens = np.array([int(training.index.tokens[pack].sum()) for pack in packs])
    room = recipe.data.max_tokens_per_pack
    return PackFacts(
        streamed=training.streamed,
        packs=len(packs),
        packs_per_step=recipe.train.packs_per_step,
        max_tokens_per_pack=room,
        steps_per_epoch=None if training.streamed else -(-len(packs) // recipe.train.packs_per_step),
        num_steps=training.num_steps,
        mean_fill=float(tokens.sum() / (room * len(packs))) if packs else 0.0,
        histograms={
            "fill_percent": histogram(np.floor(100 * tokens / room)),
            "sequences": histogram(np.array([len(pack) for pack in packs])),
        },
    )


def view_pack(training: Training, recipe: Recipe) -> dict[str, Any] | None:
    """Build one planned pack, if possible of several samples, and return the positions of its samples.

    Returns None if no row can be used, or all rows of the pack break when they are decoded.
    """
    chosen = next((number for number, pack in enumerate(training.packs) if len(pack) > 1), 0)
    encoded = []
    for number in training.packs[chosen] if training.packs else []:
        try:
            with LAST_RESORT:
                encoded.append(training.collate.encode(training.sample(number)))
        except RowFault:
            continue
    if not encoded:
        return None
    pack = training.collate.pack(encoded)
    return {"number": chosen + 1, "max_tokens": recipe.data.max_tokens_per_pack, "sequences": _sequences(pack)}


def _sequences(pack: PackedBatch) -> list[dict[str, Any]]:
    is_label, is_visual_token = pack.labels != IGNORE_LABEL, pack.visual_pos_mask
    sequences, start = [], 0
    for name, length in zip(pack.sample_ids, pack.segments.lengths, strict=True):
        span = slice(start, start + length)
        trained, visual = is_label[span].roll(1).tolist(), is_visual_token[span].tolist()
        runs: list[list[Any]] = []  # [use, length], in order
        for is_visual, is_trained in zip(visual, trained, strict=True):
            use = "visual" if is_visual else "trained" if is_trained else "prompt"
            if not runs or runs[-1][0] != use:
                runs.append([use, 0])
            runs[-1][1] += 1
        last = pack.positions[:, start + length - 1].tolist()
        sequences.append({"id": name, "start": start, "length": length, "runs": runs, "last_position": last})
        start += length
    return sequences
