"""List samples and rejected rows as plain values, so that a script can check what reaches the model."""

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from qwen3vl_train.data.encode.chat import Slot, as_text
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.encode.media import measure
from qwen3vl_train.data.media.image import PATCH
from qwen3vl_train.data.rows.sample import ImagePart, Sample
from qwen3vl_train.inspect.scan import Scan
from qwen3vl_train.inspect.training import Entry
from qwen3vl_train.public_names import last_part

LISTED_REJECTS = 1000  # of each entry; a million would make a file of hundreds of MB
_KEYS = ("id", "source", "row", "fault", "text", "trained", "media")


def describe_sample(
    sample: Sample, encoded: EncodedSample, texts: Sequence[str], collate: MultimodalCollator
) -> dict[str, Any]:
    """Return what reaches the model, as a script can compare it. texts: of each token.

    text: the rendered chat, with one mark for each medium, as the checkpoint's template writes it.
    trained: the trained spans, in order.
    media: kind, width and height in pixels, seconds of the frame pairs of a clip, and the SHA-256 of its pixels.
    """
    pieces = collate.render(sample)
    return {
        "text": as_text(pieces),
        "trained": _trained_spans(encoded, texts),
        "media": _media(sample, encoded, collate),
    }


def sample_to_json(view: dict[str, Any]) -> dict[str, Any]:
    """Return a sample without what only draws it. view: of `samples.view_sample`."""
    values = {key: view.get(key) for key in _KEYS}
    return {key: _escaped(value) if isinstance(value, str) else value for key, value in values.items()}


def rejects_to_json(entry: Entry, scan: Scan) -> list[dict[str, Any]]:
    """Return the first rejected rows of an entry, with the words that `rejected.jsonl` has."""
    rules = entry.files[0].source.rules
    return [
        {
            "id": _escaped(rules.sample_id(last_part(reject.file), reject.row)),
            "source": _escaped(entry.name),
            "row": _escaped(entry.label_in(reject.file, reject.row)),
            "kind": reject.kind,
            "words": _escaped(reject.reason),
        }
        for reject in scan.rejects[:LISTED_REJECTS]
    ]


def _escaped(text: str) -> str:
    """Return a text that UTF-8 can hold: an unpaired surrogate, as in a broken key, becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _trained_spans(encoded: EncodedSample, texts: Sequence[str]) -> list[str]:
    trained = {row + 1 for row in encoded.label_rows.tolist()}  # a label is the token after its row
    spans = groupby(range(len(texts)), key=trained.__contains__)
    return ["".join(texts[position] for position in span) for is_trained, span in spans if is_trained]


def _media(sample: Sample, encoded: EncodedSample, collate: MultimodalCollator) -> list[dict[str, Any]]:
    slots = [piece.part for piece in collate.render(sample) if isinstance(piece, Slot)]
    media, start = [], 0
    for part, (frames, height, width) in zip(slots, encoded.grids, strict=True):
        patches = encoded.patches[start : start + frames * height * width]
        start += len(patches)
        is_image = isinstance(part, ImagePart)
        if is_image:  # next to a clip, an image has its frame twice
            patches = patches.view(len(patches), 3, -1, PATCH * PATCH)[:, :, 0].contiguous()
        media.append(
            {
                "kind": "image" if is_image else "video",
                "width": width * PATCH,
                "height": height * PATCH,
                "times": [] if is_image else list(measure(part, collate.budgets, sample.media_root).times),
                "pixels_sha256": hashlib.sha256(patches.numpy().tobytes()).hexdigest(),
            }
        )
    return media
