"""Hold the facts about the data of a recipe as plain values, which the page, the terminal and `--json` all show."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SHOWN_ROWS = 50  # that are listed at the most; counts are always of all
_BINS = 24
_LONG_TAIL = 16  # from a maximum of 16 medians on, even steps would put nearly all rows into the first bin
_RATIO_EDGES = [2.0 ** (step / 4) for step in range(-13, 14, 2)]  # bins around 1:8, 1:5.7, 1:4 ... 1:1 ... 8:1


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins, and their summary. Without values there are no bins, and all numbers are 0.

    scale: 'unit' (a bin is one whole number), 'linear', 'log' (each bin twice the one before) or 'ratio' (width over
        height, outer bins open).
    counts: counts[i] values are in edges[i] <= value < edges[i+1]; the outermost bins take all beyond them.
    """

    scale: str
    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    minimum: float = 0.0
    median: float = 0.0
    mean: float = 0.0
    p95: float = 0.0
    maximum: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class RejectGroup:
    """Rows of one file that are rejected with faults of one kind.

    kind: an `errors.FaultKind`.
    reason: of the first row.
    rows: the first ones.
    """

    kind: str
    reason: str
    count: int
    rows: list[str]


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong.

    check: a key of `findings.CHECKS`.
    level: 'error' (training stops or learns nonsense), 'warning' or 'note'.
    source: its name, or '' for the whole recipe.
    evidence: the count in words.
    rows: the first ones.
    """

    check: str
    level: str
    source: str
    message: str
    remedy: str
    evidence: str
    count: int
    rows: list[str]


@dataclass(frozen=True)
class DuplicateFacts:
    """Rows whose text and media both equal those of an earlier row.

    count: rows that repeat one of the same role (training or held out).
    pairs: the first of them as (row, file and row of the earlier one).
    leaked, leaked_pairs: the same for held-out rows that are also training rows.
    """

    count: int = 0
    pairs: list[tuple[str, str]] = field(default_factory=list)
    leaked: int = 0
    leaked_pairs: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class SourceFacts:
    """One entry of data.train or data.eval.

    Rows are named as a person finds them: by line or number from 1, with the file if the entry has several.

    role: 'train' or 'eval'.
    formats: format of rows -> how many of those examined have it.
    dropped: rows skipped by data.too_long.
    tokens, visual_tokens: of all usable rows.
    examined: usable rows whose text and media headers were read; the counts that follow it are of these.
    added_tokens: name of an added token in the texts -> how often it is there.
    rows_with_boxes: of those that have an image.
    ignored: what was not used, such as "turn.recipient" -> rows examined that have it; columns of typed files count for
        every row.
    nothing_to_learn: the first rows in which no token is trained, rejected ones included.
    """

    name: str
    role: str
    weight: float
    files: int
    formats: dict[str, int]
    rows: int
    usable: int
    dropped: int
    rejects: list[RejectGroup]
    tokens: int
    visual_tokens: int
    examined: int
    examined_tokens: int
    label_tokens: int
    added_tokens: dict[str, int]
    rows_with_images: int
    rows_with_boxes: int
    images: int
    videos: int
    ignored: dict[str, int]
    nothing_to_learn: list[str]
    num_nothing_to_learn: int
    histograms: dict[str, Histogram]
    duplicates: DuplicateFacts

    @property
    def rejected(self) -> int:
        return sum(group.count for group in self.rejects)

    @property
    def label_tokens_of_all(self) -> float:
        """Estimate the trained tokens of all usable rows from those examined."""
        return self.label_tokens * self.usable / self.examined if self.examined else 0.0


@dataclass(frozen=True)
class PackFacts:
    """The plan of the first epoch; all 0 if no row can be used.

    streamed: the plan is of the first rows of each source, and the number of steps of an epoch is not known.
    mean_fill: tokens over the room of all packs, 0..1.
    """

    streamed: bool
    packs: int
    packs_per_step: int
    max_tokens_per_pack: int
    steps_per_epoch: int | None
    num_steps: int
    mean_fill: float
    histograms: dict[str, Histogram]


@dataclass(frozen=True)
class Facts:
    """Everything. model: path, dialect of its chat template, and the limits of an image in visual tokens."""

    recipe: str
    model: dict[str, Any]
    sources: list[SourceFacts]
    packs: PackFacts
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists. Findings keep the keys of the first release: hazards, each of a kind."""
        values = asdict(self)
        for source, plain in zip(self.sources, values["sources"], strict=True):
            plain["rejected"] = source.rejected
        values["hazards"] = [
            {"kind": finding.pop("check"), "hazard": finding.pop("message"), **finding}
            for finding in values.pop("findings")
        ]
        return values


def histogram(values: np.ndarray) -> Histogram:
    """Sort numbers of at least 0 into bins. [1, 1, 3] -> edges 1 2 3 4, counts 2 0 1.

    The bins suit the values: whole numbers, even steps, or powers of two for a long tail.
    """
    if not values.size:
        return Histogram("unit")
    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    if high - low < _BINS and bool(np.all(values == np.floor(values))):
        return _fill("unit", values, np.arange(low, high + 2))
    if high > _LONG_TAIL * max(middle, 1.0):
        first = math.floor(math.log2(max(low, 1.0)))
        powers = 2.0 ** np.arange(first, math.floor(math.log2(high)) + 2)
        return _fill("log", values, powers if low >= 1 else np.concatenate([[0.0], powers]))
    step = _round_up((high - low) / _BINS)
    start = math.floor(low / step) * step
    count = max(1, math.ceil((high - start) / step))
    return _fill("linear", values, start + step * np.arange(count + 1))


def ratio_histogram(values: np.ndarray) -> Histogram:
    """Sort ratios of width to height into bins that are symmetric in wide and tall."""
    return _fill("ratio", values, np.array(_RATIO_EDGES)) if values.size else Histogram("ratio")


def _round_up(step: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... so that edges are numbers a person would choose."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * (1 - 1e-9))


def _fill(scale: str, values: np.ndarray, edges: np.ndarray) -> Histogram:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return Histogram(
        scale,
        [round(float(edge), 6) for edge in edges],
        np.bincount(bins, minlength=len(edges) - 1).tolist(),
        float(values.min()),
        float(np.median(values)),
        float(values.mean()),
        float(np.percentile(values, 95)),
        float(values.max()),
        float(values.sum()),
    )
