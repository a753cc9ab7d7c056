"""The facts about the data of a recipe, as plain values: what the page, the terminal and `--json` all show."""

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN_ROWS = 50
"""How many rows are listed where more may be meant; counts are always of all."""


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie in edges[i] <= value < edges[i+1]; the outermost bins take all beyond them.

    scale: 'unit' (a bin is one whole number), 'linear', 'log' (each bin twice the one before) or 'ratio' (width over
    height, outer bins open). Without values: no bins, all numbers 0.
    """

    scale: str
    edges: list[float]
    counts: list[int]
    minimum: float = 0.0
    median: float = 0.0
    mean: float = 0.0
    p95: float = 0.0
    maximum: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class RejectGroup:
    """Rows that cannot be used for one kind of reason. reason: that of the first row. rows: the first ones."""

    reason: str
    count: int
    rows: list[str]


@dataclass(frozen=True)
class Hazard:
    """Something that looks wrong. kind: one of `kinds.KINDS`. level: 'error' (training stops or learns nonsense),
    'warning' or 'note'. source: name, or '' for the whole recipe. evidence: the count in words. rows: the first ones.
    """

    kind: str
    level: str
    source: str
    hazard: str
    remedy: str
    evidence: str
    count: int
    rows: list[str]


@dataclass(frozen=True)
class DuplicateFacts:
    """Rows whose text and media both equal those of an earlier row: pairs of (row, file and row of the earlier one).

    count: rows that repeat one of the same role (training or held out). leaked: held-out rows that are also training
    rows. pairs, leaked_pairs: the first of each.
    """

    count: int = 0
    pairs: list[tuple[str, str]] = field(default_factory=list)
    leaked: int = 0
    leaked_pairs: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class SourceFacts:
    """One entry of data.train or data.eval. role: 'train' or 'eval'. Rows are named as a person finds them: by line
    or number from 1, with the file where the entry has several.

    dropped: rows left out by data.too_long.     formats: shape of rows -> how many of those examined have it.
    tokens and visual_tokens: of all usable rows. examined: usable rows whose text and media headers were read for all
    that is counted below it; examined_tokens: their tokens. rows_with_boxes: beside a picture. nothing_to_learn: the
    first rows in which no token is trained, rejected ones included.
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
    rows_with_images: int
    rows_with_boxes: int
    images: int
    videos: int
    nothing_to_learn: list[str]
    num_nothing_to_learn: int
    histograms: dict[str, Histogram]
    duplicates: DuplicateFacts

    @property
    def rejected(self) -> int:
        return sum(group.count for group in self.rejects)

    @property
    def label_tokens_of_all(self) -> float:
        """Trained tokens of all usable rows, as far as those examined tell."""
        return self.label_tokens * self.usable / self.examined if self.examined else 0.0


@dataclass(frozen=True)
class PackFacts:
    """The plan of the first epoch and what follows from it; all 0 where no row can be used.

    mean_fill: tokens over the room of all packs, 0..1. streamed: the plan is of the rows that were read of each source,
    and how many steps an epoch has is not known.
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
    """Everything. model: path, dialect of its chat template, and the budgets of a picture in visual tokens."""

    recipe: str
    model: dict[str, Any]
    sources: list[SourceFacts]
    packs: PackFacts
    hazards: list[Hazard]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, for `json.dumps`."""
        values = asdict(self)
        for source, plain in zip(self.sources, values["sources"], strict=True):
            plain["rejected"] = source.rejected
        return values
