"""Add up what the rows of one entry say."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import FaultKind, Reject, RowFault
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.entries import Entry, RowRef
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts, Histogram, RejectGroup, SourceFacts
from qwen3vl_train.inspect.histogram import histogram, ratio_histogram
from qwen3vl_train.inspect.rows import RowFacts, read_row


@dataclass(frozen=True)
class Scan:
    """What was found in one entry. rows_of: kind of hazard -> the rows that show it, named for a person; kinds_of: row
    -> its kinds. boxes: of each row that has some.
    """

    facts: SourceFacts
    rows_of: dict[str, list[str]]
    kinds_of: dict[RowRef, frozenset[str]]
    boxes: list[BoxEvidence]


def look_at(entry: Entry, ref: RowRef, collate: MultimodalCollator) -> RowFacts | Reject:
    """Look at one row; a Reject where it cannot be read any more."""
    try:
        return read_row(entry.sample(ref), entry.visual_tokens(ref), collate)
    except RowFault as fault:
        source = entry.files[ref.file].source
        return Reject.from_fault(source.name, source.row_number(ref.row), fault)


def add_up(entry: Entry, read: Sequence[tuple[RowRef, RowFacts]], broken: Sequence[Reject]) -> Scan:
    """Sum up the rows that were read; broken ones join those that the index rejected. Duplicates are not known yet."""
    tokens, visual_tokens = (
        np.concatenate([getattr(file.index, column)[file.usable()] for file in entry.files])
        for column in ("tokens", "visual_tokens")
    )
    rejects = [reject for file in entry.files for reject in file.rejects]
    of_index = len(rejects)
    rejects += broken
    num_rows = sum(len(file.source) for file in entry.files)
    untrained = [entry.label(ref) for ref, facts in read if not facts.label_tokens]
    untrained += [entry.label_in(*reject[:2]) for reject in rejects if reject.kind == "nothing_to_learn"]
    no_rate = [reject for reject in rejects if reject.kind == "no_frame_rate"]
    rows_of = {"fps_missing": [entry.label_in(*reject[:2]) for reject in no_rate]}
    for ref, facts in read:
        for kind in facts.hazards:
            rows_of.setdefault(kind, []).append(entry.label(ref))
    boxes = [facts.boxes for _, facts in read if facts.boxes is not None]
    facts = SourceFacts(
        name=entry.name,
        role=entry.role,
        weight=entry.weight,
        files=len(entry.files),
        formats=dict(Counter(facts.shape for _, facts in read).most_common()),
        rows=num_rows,
        usable=len(tokens),
        dropped=num_rows - len(tokens) - of_index,
        rejects=_group_rejects(entry, rejects),
        tokens=int(tokens.sum()),
        visual_tokens=int(visual_tokens.sum()),
        examined=len(read),
        examined_tokens=sum(entry.tokens(ref) for ref, _ in read),
        label_tokens=sum(facts.label_tokens for _, facts in read),
        rows_with_images=sum(bool(facts.sizes) for _, facts in read),
        rows_with_boxes=len(boxes),
        images=sum(len(facts.sizes) for _, facts in read),
        videos=sum(facts.videos for _, facts in read),
        nothing_to_learn=untrained[:SHOWN_ROWS],
        num_nothing_to_learn=len(untrained),
        histograms=_histograms(tokens, visual_tokens, [facts for _, facts in read]),
        duplicates=DuplicateFacts(),
    )
    kinds_of = {ref: facts.hazards for ref, facts in read if facts.hazards}
    return Scan(facts, rows_of, kinds_of, boxes)


def _histograms(tokens: np.ndarray, visual_tokens: np.ndarray, read: list[RowFacts]) -> dict[str, Histogram]:
    ratios = [width / height for facts in read for height, width in facts.sizes]
    return {
        "text_tokens": histogram(tokens - visual_tokens),
        "visual_tokens": histogram(visual_tokens),
        "images": histogram(np.array([len(facts.sizes) for facts in read])),
        "aspect_ratios": ratio_histogram(np.array(ratios)),
        "turns": histogram(np.array([facts.turns for facts in read])),
    }


def _group_rejects(entry: Entry, rejects: Sequence[Reject]) -> list[RejectGroup]:
    """Join rejects of one kind, the most frequent first; the reason of the first stands for the group.

    Half a surrogate pair, which may stand in the name of a key, becomes its escape: no terminal takes it.
    """
    groups: dict[FaultKind, list[Reject]] = {}
    for reject in rejects:
        groups.setdefault(reject.kind, []).append(reject)
    return [
        RejectGroup(
            group[0].reason.encode("utf-8", "backslashreplace").decode(),
            len(group),
            [entry.label_in(*reject[:2]) for reject in group[:SHOWN_ROWS]],
        )
        for group in sorted(groups.values(), key=len, reverse=True)
    ]
