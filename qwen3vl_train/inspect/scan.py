"""Add up what the rows of one entry say."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import Reject, RowFault
from qwen3vl_train.inspect.entries import Entry, RowRef
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts, Histogram, RejectGroup, SourceFacts
from qwen3vl_train.inspect.histogram import histogram, ratio_histogram
from qwen3vl_train.inspect.rows import RowFacts, read_row

_NOTHING = "nothing to learn"


@dataclass(frozen=True)
class Scan:
    """What was found in one entry. refs_of: kind of hazard -> rows; kinds_of: row -> its kinds. boxes_in_pixels: one
    `RowFacts.boxes_in_pixels` for each row that has one.
    """

    facts: SourceFacts
    refs_of: dict[str, list[RowRef]]
    kinds_of: dict[RowRef, frozenset[str]]
    boxes_in_pixels: list[bool]


def look_at(entry: Entry, ref: RowRef, collate: MultimodalCollator) -> RowFacts | Reject:
    """Look at one row; a Reject where it cannot be read any more."""
    try:
        return read_row(entry.sample(ref), entry.visual_tokens(ref), collate)
    except RowFault as fault:
        source = entry.files[ref.file].source
        return Reject(source.name, source.row_number(ref.row), str(fault))


def add_up(entry: Entry, read: Sequence[tuple[RowRef, RowFacts]], broken: Sequence[Reject]) -> Scan:
    """Sum up the rows that were read; broken ones join those that the index rejected. Duplicates are not known yet."""
    tokens, visual_tokens = (
        np.concatenate([getattr(file.index, column)[file.usable()] for file in entry.files])
        for column in ("tokens", "visual_tokens")
    )
    rejects = [reject for file in entry.files for reject in file.rejects()]
    num_rows = sum(len(file.source) for file in entry.files)
    untrained = [entry.label(ref) for ref, facts in read if not facts.label_tokens]
    untrained += [entry.label_in(*reject[:2]) for reject in rejects if reject.reason.startswith(_NOTHING)]
    refs_of: dict[str, list[RowRef]] = {}
    for ref, facts in read:
        for kind in facts.hazards:
            refs_of.setdefault(kind, []).append(ref)
    facts = SourceFacts(
        name=entry.name,
        role=entry.role,
        weight=entry.weight,
        files=len(entry.files),
        formats=dict(Counter(facts.shape for _, facts in read).most_common()),
        rows=num_rows,
        usable=len(tokens),
        dropped=num_rows - len(tokens) - len(rejects),
        rejects=group_rejects(entry, [*rejects, *broken]),
        tokens=int(tokens.sum()),
        visual_tokens=int(visual_tokens.sum()),
        examined=len(read),
        examined_tokens=sum(entry.tokens(ref) for ref, _ in read),
        label_tokens=sum(facts.label_tokens for _, facts in read),
        rows_with_images=sum(bool(facts.sizes) for _, facts in read),
        images=sum(len(facts.sizes) for _, facts in read),
        videos=sum(facts.videos for _, facts in read),
        nothing_to_learn=untrained[:SHOWN_ROWS],
        num_nothing_to_learn=len(untrained),
        histograms=_histograms(tokens, visual_tokens, [facts for _, facts in read]),
        duplicates=DuplicateFacts(),
    )
    kinds_of = {ref: facts.hazards for ref, facts in read if facts.hazards}
    asked = [facts.boxes_in_pixels for _, facts in read if facts.boxes_in_pixels is not None]
    return Scan(facts, refs_of, kinds_of, asked)


def _histograms(tokens: np.ndarray, visual_tokens: np.ndarray, read: list[RowFacts]) -> dict[str, Histogram]:
    ratios = [width / height for facts in read for height, width in facts.sizes]
    return {
        "text_tokens": histogram(tokens - visual_tokens),
        "visual_tokens": histogram(visual_tokens),
        "images": histogram(np.array([len(facts.sizes) for facts in read])),
        "aspect_ratios": ratio_histogram(np.array(ratios)),
        "turns": histogram(np.array([facts.turns for facts in read])),
    }


def group_rejects(entry: Entry, rejects: Sequence[Reject]) -> list[RejectGroup]:
    """Join rejects whose reasons differ only in names, paths and numbers, the most frequent first."""
    groups: dict[str, list[Reject]] = {}
    for reject in rejects:
        alike = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|(?:image|video) \S+|\S*/\S*|\d+", "*", reject.reason)
        groups.setdefault(alike, []).append(reject)
    return [
        RejectGroup(group[0].reason, len(group), [entry.label_in(*reject[:2]) for reject in group[:SHOWN_ROWS]])
        for group in sorted(groups.values(), key=len, reverse=True)
    ]
