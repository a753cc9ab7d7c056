"""The rules that say when something looks wrong in data."""

from collections import Counter
from pathlib import Path

from qwen3vl_train.config import Recipe
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.checks import KINDS
from qwen3vl_train.inspect.facts import SHOWN_ROWS, Hazard, PackFacts, SourceFacts

# Shares from which on something is worth a line; below them it is the ordinary unevenness of real data.
_MANY_ROWS = 0.10
_WITHOUT_REASONING = 0.05
_MANY_DUPLICATES = 0.01
_DOMINATES = 0.90
_FEW_LABELS = 0.01
_LOW_FILL = 0.90
_WRONG_CONVENTION = 0.05
"""Of the rows with boxes. A data set in another convention shows it in nearly all of them, a slip of the pen in few."""
_MANY_BOXES = 20
"""Rows; that the boxes of so many keep within a limit by chance is out of the question."""
_NEAR_THE_END = 900
"""Pixels of a large picture. Boxes of real objects come this near to the end of their scale now and then."""


def make(
    kind: str, source: str, count: int, of: int, rows: list[str] | None = None, level: str | None = None
) -> Hazard:
    """Write one hazard out. source: name, or '' for the whole recipe. level: where it is not that of its kind."""
    told = KINDS[kind]
    evidence = f"{count:,} of {of:,} {told.unit}" + (f" ({100 * count / of:.3g}%)" if of else "")
    shown = (rows or [])[:SHOWN_ROWS]
    return Hazard(kind, level or told.level, source, told.hazard, told.remedy, evidence, count, shown)


def row_hazards(source: SourceFacts, found: dict[str, list[str]]) -> list[Hazard]:
    """Judge what single rows showed. found: kind -> rows of this source that show it.

    Few odd boxes among many sound ones are broken rows, not another convention: a note.
    """
    asked = {
        "fps_missing": source.rows,
        **dict.fromkeys(("shrunk", "enlarged"), source.rows_with_images),
        **dict.fromkeys(("boxes_pixel", "boxes_unit", "boxes_xywh"), source.rows_with_boxes),
    }
    few = {"no_reasoning": _WITHOUT_REASONING, "shrunk": _MANY_ROWS, "enlarged": _MANY_ROWS}
    hazards = []
    for kind, rows in sorted(found.items()):
        of = asked.get(kind, source.examined)
        odd_ones = kind.startswith("boxes_") and len(rows) < _WRONG_CONVENTION * of
        if rows and len(rows) >= few.get(kind, 0) * of:
            hazards.append(make(kind, source.name, len(rows), of, rows, "note" if odd_ones else None))
    return hazards


def box_hazards(source: SourceFacts, boxes: list[BoxEvidence]) -> list[Hazard]:
    """Judge the boxes of all rows together, where each alone may be right."""
    hazards = []
    in_pixels = [one.in_pixels for one in boxes if one.in_pixels is not None]
    if len(in_pixels) >= _MANY_BOXES and all(in_pixels):
        hazards.append(make("boxes_small_pixel", source.name, len(in_pixels), len(in_pixels)))
    furthest = [one.furthest for one in boxes if one.furthest is not None]
    near = sum(pixel >= _NEAR_THE_END for pixel in furthest)
    if len(furthest) >= _MANY_BOXES and max(furthest) <= 1000 and near >= _MANY_ROWS * len(furthest):
        hazards.append(make("boxes_shrunk", source.name, near, len(furthest)))
    return hazards


def source_hazards(source: SourceFacts) -> list[Hazard]:
    """Judge one source by its sums."""
    name, hazards = source.name, []
    if source.num_nothing_to_learn:
        hazards.append(
            make("nothing_to_learn", name, source.num_nothing_to_learn, source.rows, source.nothing_to_learn)
        )
    if source.label_tokens < _FEW_LABELS * source.examined_tokens:
        hazards.append(make("few_labels", name, source.label_tokens, source.examined_tokens))
    same = source.duplicates
    if same.count > _MANY_DUPLICATES * source.examined:
        hazards.append(make("duplicates", name, same.count, source.examined, [row for row, _ in same.pairs]))
    if same.leaked:
        hazards.append(make("leak", name, same.leaked, source.examined, [row for row, _ in same.leaked_pairs]))
    return hazards


def recipe_hazards(sources: list[SourceFacts], packs: PackFacts, recipe: Recipe) -> list[Hazard]:
    """Judge the sources against each other, and the plan."""
    hazards = []
    training = [source for source in sources if source.role == "train"]
    for group in (training, *([source] for source in sources if source.role == "eval")):
        rejected, rows = (sum(getattr(source, what) for source in group) for what in ("rejected", "rows"))
        if rejected > recipe.data.max_rejected_fraction * rows:
            hazards.append(make("rejects", group[0].name if len(group) == 1 else "", rejected, rows))
    if not packs.packs:
        num_rows = sum(source.rows for source in training)
        hazards.append(make("no_rows", "", num_rows, num_rows))
    names = Counter(entry.name or Path(entry.path).stem for entry in recipe.data.eval)
    if same := sum(count for count in names.values() if count > 1):
        hazards.append(make("same_name", "", same, len(recipe.data.eval)))
    trained = {source.name: source.weight * source.label_tokens_of_all for source in training}
    total = sum(trained.values())
    for name, tokens in trained.items():
        if len(trained) > 1 and not packs.streamed and tokens > _DOMINATES * total:
            hazards.append(make("dominates", name, round(tokens), round(total)))
    if packs.mean_fill < _LOW_FILL and packs.packs > 1:
        room = packs.packs * packs.max_tokens_per_pack
        hazards.append(make("low_fill", "", round(packs.mean_fill * room), room))
    if packs.packs and recipe.optim.warmup_steps >= packs.num_steps:
        hazards.append(make("short_run", "", recipe.optim.warmup_steps, packs.num_steps))
    return hazards
