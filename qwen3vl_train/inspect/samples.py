"""What the model sees of a row: its pictures at their final size, every token, and which of them are trained."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.encode.tokenizer import ChatTokenizer
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.inspect.entries import Entry, RowRef
from qwen3vl_train.inspect.marks import find_marks
from qwen3vl_train.inspect.pictures import view_frames
from qwen3vl_train.inspect.scan import Scan

_LONGEST_CHARACTER = 4  # tokens: a byte each


def choose_rows(entries: Sequence[Entry], scans: Sequence[Scan], num_samples: int) -> list[RowRef]:
    """Choose rows to show: one for each kind of hazard that rows have, the rest evenly from all entries in turn."""
    chosen: dict[RowRef, None] = {}
    shown: set[str] = set()
    for scan in scans:
        for ref, kinds in scan.kinds_of.items():
            if len(chosen) < num_samples and not kinds <= shown:
                chosen[ref] = None
                shown |= kinds
    for refs in zip_longest(*(entry.spread(num_samples) for entry in entries)):
        for ref in refs:
            if ref is not None and len(chosen) < num_samples:
                chosen[ref] = None
    return sorted(chosen)


def view_sample(entry: Entry, ref: RowRef, kinds: frozenset[str], collate: MultimodalCollator) -> dict[str, Any]:
    """Encode one row as the loader will, and return what there is to show; of one that breaks then, its fault.

    kinds: of the hazards it shows.
    """
    name = f"{entry.name}:{entry.label(ref)}"
    view: dict[str, Any] = {"source": entry.name, "role": entry.role, "row": entry.label(ref), "fault": None}
    try:
        sample = entry.sample(ref)
        name = sample.sample_id
        encoded, listed = collate.encode(sample), entry.listed(ref)
    except RowFault as fault:
        return {**view, "id": name, "fault": str(fault), "kinds": sorted({*kinds, "undecodable"})}
    return {
        **view,
        "id": name,
        "kinds": sorted(kinds),
        "frames": view_frames(encoded),
        "marks": [mark._asdict() for mark in find_marks(sample, listed)],
        **view_tokens(encoded, collate.tokenizer),
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
        "special": [place for place, token in enumerate(ids) if token in special],
        "weights": weights,
        "positions": encoded.positions.tolist(),
        "visual": [[slot.offset, slot.length] for slot in encoded.slices],
    }


def token_texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """Return the text of each token. A character cut across several stands with the first, the others are ''."""

    def decoded(first: int, last: int) -> str:
        return tokenizer.decode(list(ids[first:last]), skip_special_tokens=False)

    texts: list[str] = []
    start = 0
    while start < len(ids):
        end = start + 1
        text = decoded(start, end)
        if "\ufffd" in text:  # a part of a character: it ends where what follows reads the same with and without it
            horizon = start + 2 * _LONGEST_CHARACTER
            ends = range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1)
            whole = decoded(start, horizon)
            end = next((end for end in ends if decoded(start, end) + decoded(end, horizon) == whole), start + 1)
            text = decoded(start, end)
        texts += [text, *[""] * (end - start - 1)]
        start = end
    return texts
