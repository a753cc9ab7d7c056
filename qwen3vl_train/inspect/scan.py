"""Read the rows of one entry, and count what they show."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.errors import LAST_RESORT, FaultKind, Reject, RowFault
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.facts import SHOWN_ROWS, DuplicateFacts, RejectGroup, SourceFacts, histogram, ratio_histogram
from qwen3vl_train.inspect.rows import RowFacts, read_row
from qwen3vl_train.inspect.training import Entry, RowRef

_SHOWN_MARKS = 5  # that a finding names


@dataclass(frozen=True)
class Scan:
    """What was found in one entry.

    rejects: all rows that cannot be used.
    rows_by_check: check -> the rows that fail it, named for a person.
    details: check -> what its finding says beside the number of rows.
    failed_checks: row -> the checks that it fails.
    boxes: of each row that has some.
    """

    facts: SourceFacts
    rejects: list[Reject]
    rows_by_check: dict[str, list[str]]
    details: dict[str, str]
    failed_checks: dict[RowRef, frozenset[str]]
    boxes: list[BoxEvidence]


def scan_row(entry: Entry, ref: RowRef, collate: MultimodalCollator) -> RowFacts | Reject:
    """Read one row; return a Reject if it can no longer be read."""
    try:
        with LAST_RESORT:
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
    details: dict[str, str] = {}
    _find_questions_first(entry, read, rows_by_check, details)
    details["foreign_mark"] = _name_marks(Counter(mark for _, facts in read for mark in facts.foreign_marks))
    boxes = [facts.boxes for _, facts in read if facts.boxes is not None]
    facts = SourceFacts(
        name=entry.name,
        role=entry.role,
        weight=entry.weight,
        files=len(entry.files),
        formats=dict(Counter(facts.row_format for _, facts in read).most_common()),
        rows=num_rows,
        usable=len(tokens),
        dropped=num_rows - len(tokens) - num_rejected_by_index,
        rejects=_group_rejects(entry, rejects),
        tokens=int(tokens.sum()),
        visual_tokens=int(visual_tokens.sum()),
        examined=len(read),
        examined_tokens=sum(entry.tokens(ref) for ref, _ in read),
        label_tokens=sum(facts.label_tokens for _, facts in read),
        added_tokens=dict(sum((Counter(facts.added_tokens) for _, facts in read), Counter()).most_common()),
        rows_with_images=sum(bool(facts.sizes) for _, facts in read),
        rows_with_boxes=len(boxes),
        images=sum(len(facts.sizes) for _, facts in read),
        videos=sum(facts.videos for _, facts in read),
        ignored=_count_ignored(entry, read),
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
    return Scan(facts, rejects, rows_by_check, details, failed_checks, boxes)


def _name_marks(marks: Counter[str]) -> str:
    """Return the most frequent marks with their counts. "[IMG] 2, <start_of_image> 1" """
    named = ", ".join(f"{mark[:40]} {count:,}" for mark, count in marks.most_common(_SHOWN_MARKS))
    return named + (f" and {len(marks) - _SHOWN_MARKS} others" if len(marks) > _SHOWN_MARKS else "")


def _count_ignored(entry: Entry, read: Sequence[tuple[RowRef, RowFacts]]) -> dict[str, int]:
    """Count the rows in which something was not used, the most frequent first, by its name."""
    counts: Counter[str] = Counter()
    rows_of_file: Counter[int] = Counter()
    for ref, facts in read:
        counts.update(facts.ignored)
        rows_of_file[ref.file] += 1
    for number, file in enumerate(entry.files):
        for column in file.source.ignored_columns:
            counts[f"row.{column}"] += rows_of_file[number]
    return {name: count for name, count in counts.most_common() if count}


def _find_questions_first(
    entry: Entry,
    read: Sequence[tuple[RowRef, RowFacts]],
    rows_by_check: dict[str, list[str]],
    details: dict[str, str],
) -> None:
    """Add the rows that share their first medium with others, but not the text before it."""
    by_medium: dict[bytes, list[tuple[RowRef, bytes]]] = {}
    for ref, facts in read:
        if facts.first_medium is not None:
            by_medium.setdefault(facts.first_medium, []).append((ref, facts.text_before))
    shared = [rows for rows in by_medium.values() if len({text for _, text in rows}) > 1]
    if shared:
        rows_by_check["question_first"] = [entry.label(ref) for rows in shared for ref, text in rows if text]
        one, other = (entry.label(ref) for ref, _ in shared[0][:2])
        details["question_first"] = f"rows {one} and {other} have the same first image"


def _group_rejects(entry: Entry, rejects: Sequence[Reject]) -> list[RejectGroup]:
    """Join the rejects of one file and one kind of fault, the most frequent first.

    An unpaired surrogate, which may be in the name of a key, becomes its escape, since no terminal takes it.
    """
    groups: dict[tuple[str, FaultKind], list[Reject]] = {}
    for reject in rejects:
        groups.setdefault((reject.file, reject.kind), []).append(reject)
    return [
        RejectGroup(
            group[0].kind,
            group[0].reason.encode("utf-8", "backslashreplace").decode(),
            len(group),
            [entry.label_in(*reject[:2]) for reject in group[:SHOWN_ROWS]],
        )
        for group in sorted(groups.values(), key=len, reverse=True)
    ]
