"""Read the rows of one entry, and count what they show."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import FaultKind, Reject, RowFault
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts, RejectGroup, SourceFacts, histogram, ratio_histogram
from qwen3vl_train.inspect.rows import RowFacts, read_row
from qwen3vl_train.inspect.training import Entry, RowRef

# What differs between rows that are rejected for the same reason: names, paths and numbers.
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|(?:image|video) [^:]*(?=: )|\S*/\S*|\d+")


@dataclass(frozen=True)
class Scan:
    """What was found in one entry.

    rejects: all rows that cannot be used.
    rows_by_check: check -> the rows that fail it, named for a person.
    failed_checks: row -> the checks that it fails.
    boxes: of each row that has some.
    """

    facts: SourceFacts
    rejects: list[Reject]
    rows_by_check: dict[str, list[str]]
    failed_checks: dict[RowRef, frozenset[str]]
    boxes: list[BoxEvidence]


def scan_row(entry: Entry, ref: RowRef, collate: MultimodalCollator) -> RowFacts | Reject:
    """Read one row; return a Reject if it can no longer be read."""
    try:
        return read_row(entry.sample(ref), entry.visual_tokens(ref), collate)
    except RowFault as fault:
        source = entry.files[ref.file].source
        return Reject.from_fault(source.name, source.row_number(ref.row), fault)


def summarize(entry: Entry, read: Sequence[tuple[RowRef, RowFacts]], broken: Sequence[Reject]) -> Scan:
    """Count what was read; broken rows join those that the index rejected. Duplicates are not known yet."""
    tokens, visual_tokens = (
        np.concatenate([getattr(file.index, column)[file.usable()] for file in entry.files])
        for column in ("tokens", "visual_tokens")
    )
    rejects = [reject for file in entry.files for reject in file.rejects]
    num_rejected_by_index = len(rejects)
    rejects += broken
    num_rows = sum(len(file.source) for file in entry.files)
    untrained = [entry.label(ref) for ref, facts in read if not facts.label_tokens]
    untrained += [entry.label_in(*reject[:2]) for reject in rejects if reject.kind == "nothing_to_learn"]
    no_rate = [reject for reject in rejects if reject.kind == "no_frame_rate"]
    rows_by_check = {"fps_missing": [entry.label_in(*reject[:2]) for reject in no_rate]}
    for ref, facts in read:
        for check in facts.failed_checks:
            rows_by_check.setdefault(check, []).append(entry.label(ref))
    boxes = [facts.boxes for _, facts in read if facts.boxes is not None]
    facts = SourceFacts(
        name=entry.name,
        role=entry.role,
        weight=entry.weight,
        files=len(entry.files),
        formats=dict(Counter(facts.shape for _, facts in read).most_common()),
        rows=num_rows,
        usable=len(tokens),
        dropped=num_rows - len(tokens) - num_rejected_by_index,
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
        histograms={
            "text_tokens": histogram(tokens - visual_tokens),
            "visual_tokens": histogram(visual_tokens),
            "images": histogram(np.array([len(facts.sizes) for _, facts in read])),
            "aspect_ratios": ratio_histogram(np.array([w / h for _, facts in read for h, w in facts.sizes])),
            "turns": histogram(np.array([facts.turns for _, facts in read])),
        },
        duplicates=DuplicateFacts(),
    )
    failed_checks = {ref: facts.failed_checks for ref, facts in read if facts.failed_checks}
    return Scan(facts, rejects, rows_by_check, failed_checks, boxes)


def _group_rejects(entry: Entry, rejects: Sequence[Reject]) -> list[RejectGroup]:
    """Join rejects of one kind whose reasons differ only in names, paths and numbers, the most frequent first.

    An unpaired surrogate, which may be in the name of a key, becomes its escape, since no terminal takes it.
    """
    groups: dict[tuple[FaultKind, str], list[Reject]] = {}
    for reject in rejects:
        groups.setdefault((reject.kind, _VARYING.sub("*", reject.reason)), []).append(reject)
    return [
        RejectGroup(
            group[0].reason.encode("utf-8", "backslashreplace").decode(),
            len(group),
            [entry.label_in(*reject[:2]) for reject in group[:SHOWN_ROWS]],
        )
        for group in sorted(groups.values(), key=len, reverse=True)
    ]
