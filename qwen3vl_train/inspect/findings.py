"""Judge the facts: what can look wrong in data, each with its remedy, and the rules that say when it does."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwen3vl_train.config import Recipe
from qwen3vl_train.data.encode.tokenizer import RELEASED_TOKENS
from qwen3vl_train.inspect.boxes import BoxEvidence
from qwen3vl_train.inspect.facts import SHOWN_ROWS, Finding, PackFacts, SourceFacts
from qwen3vl_train.inspect.rows import NOTED_TOKENS
from qwen3vl_train.public_names import last_part

# Shares from which on something is reported; below them it is the ordinary unevenness of real data.
_MANY_ROWS = 0.10
_WITHOUT_REASONING = 0.05
_MANY_DUPLICATES = 0.01
_DOMINATES = 0.90
_FEW_LABELS = 0.01
_LOW_FILL = 0.90
_WRONG_CONVENTION = 0.05  # of the rows with boxes: another convention shows in nearly all rows, a mistake in few
_MANY_BOXES = 20  # rows whose boxes cannot all be within a limit by chance
_NEAR_THE_END = 900  # pixels of a large image; some boxes of real objects come this near to the end of their scale
_SHOWN_TOKENS = 8


class Check(NamedTuple):
    """What is seen and why it matters, and what to do. unit: what is counted."""

    level: str
    unit: str
    message: str
    remedy: str


CHECKS: dict[str, Check] = {
    "boxes_pixel": Check("error", "rows with boxes",
        "Boxes with coordinates below 0 or above 1000, which look like pixels. Qwen3-VL reads and writes thousandths "
        "of the image's width and height.",
        "List them under boxes with bbox: pixel, which converts them, or write 0-1000 of the original image."),
    "boxes_unit": Check("error", "rows with boxes",
        "Boxes with all coordinates between 0 and 1. Qwen3-VL reads and writes thousandths.",
        "List them under boxes with bbox: unit, which converts them, or multiply by 1000 and round."),
    "boxes_xywh": Check("error", "rows with boxes",
        "Boxes whose second corner is left of or above the first, which looks like x, y, width, height. Qwen3-VL "
        "writes two corners.",
        "List them under boxes with bbox_layout: xywh, which converts them, or write [x1, y1, x2, y2]."),
    "boxes_small_pixel": Check("warning", "rows with boxes and one small image",
        "In every row with boxes and one image of at most 800 pixels a side, all boxes fit the image's size in "
        "pixels. Thousandths would not.",
        "Check whether they are pixels; if so, list them under boxes with bbox: pixel, which converts them."),
    "boxes_shrunk": Check("warning", "rows with boxes and one large image",
        "Boxes of images larger than 1000 pixels reach nearly to pixel 1000, and never beyond. Thousandths that were "
        "taken for pixels do that: they were scaled down a second time.",
        "Check a sample: if its boxes are too small and too far to the left and top, declare bbox: per_mille."),
    "fps_missing": Check("error", "rows",
        "Videos without a usable frame rate, from which the times of their frames follow; their rows are rejected.",
        "Write the files again with their rate; give lists of frames with fps or timestamps."),
    "uneven_clip": Check("note", "rows",
        "Clips whose frames are not evenly spaced at the rate that their file declares: the model reads the true times "
        "of their frames.",
        "Nothing; write the files again at a constant rate if other tools are to read the same times."),
    "question_first": Check("warning", "rows",
        "Text before the image in rows that share their first image: rows can share the work on what they begin with, "
        "and these begin with different words.",
        "Write the image before the question, as Qwen3-VL's own chats do."),
    "undecodable": Check("error", "samples shown",
        "Media whose headers can be read break when they are decoded; training will reject their rows.",
        "Fix or remove the rows; show more of them with --samples."),
    "no_rows": Check("error", "rows",
        "No training row can be used: there is nothing to train on.",
        "Fix the rows: the reasons are listed under each source."),
    "same_name": Check("error", "data sets",
        "Held-out data sets share a name, which is by default the name of their file: training will not start.",
        "Give each entry under data.eval a name of its own."),
    "rejects": Check("error", "rows",
        "More rows cannot be used than data.max_rejected_fraction allows: training will not start.",
        "Fix the rows listed under the source, or raise data.max_rejected_fraction."),
    "nothing_to_learn": Check("warning", "rows",
        "Rows without a trained token.",
        "Add answers, take out loss: false, or remove the rows."),
    "empty_answer": Check("warning", "rows",
        "An empty answer is trained: the model learns to say nothing.",
        "Remove the rows, or set loss: false on those messages."),
    "special_token": Check("warning", "rows",
        "Text contains the markup of chats and media, such as <|image_pad|> or <|im_end|>. It is encoded as text, not "
        "as tokens.",
        "Remove the markup from the data: the chat template writes it."),
    "unknown_token": Check("warning", "rows",
        "Text contains names such as <|seg|> that are not added tokens of the checkpoint's tokenizer: they are encoded "
        "as letters.",
        "Add them to tokenizer and embedding of the checkpoint first, or write them in another way."),
    "added_token": Check("note", "rows",
        "Text contains added tokens of Qwen3-VL, such as <|box_start|>: each is encoded as one token, "
        "as transformers does.",
        "Look at a sample: where letters are meant, write them in another way."),
    "new_token": Check("warning", "rows",
        "Text contains added tokens that Qwen3-VL was not released with: each is encoded as one token, whose row of "
        "the embedding is trained only if the recipe says so.",
        "Train those rows with tune.new_tokens, or text_embed, unless this checkpoint was trained with them before."),
    "media_mark": Check("warning", "rows",
        "Text contains a placeholder such as <image> or <box>; the model reads it as letters.",
        "Give the medium or box that belongs there: a part of type image, or an entry under images or boxes."),
    "foreign_mark": Check("warning", "rows",
        "Text contains marks by which other model families place images or clips; the model reads and writes them as "
        "letters.",
        "Remove the marks, or write <image> or <video> in the question where a medium belongs."),
    "no_reasoning": Check("error", "rows",
        "No reasoning in any trained answer, but the checkpoint's template is that of a Thinking model: it writes an "
        "empty <think></think>, and the model unlearns to reason.",
        "Use an Instruct checkpoint, or add reasoning_content to the answers."),
    "reasoning_on_instruct": Check("warning", "rows",
        "<think> text is trained on an Instruct checkpoint, as ordinary words of the answer.",
        "Use a Thinking checkpoint, or remove the reasoning."),
    "answers_left_out": Check("note", "rows",
        "Answers that are not trained: the Thinking template keeps reasoning only after the last question.",
        "Write one row for each answer to train them all."),
    "shrunk": Check("warning", "rows with images",
        "Images keep less than half of their pixels; small print is lost.",
        "Raise data.max_visual_tokens_per_image, or crop the images."),
    "enlarged": Check("warning", "rows with images",
        "Images far below the minimum are enlarged more than four times: tokens that show nothing new.",
        "Lower data.min_visual_tokens_per_image, or join several small images into one."),
    "few_labels": Check("warning", "tokens",
        "Few of the tokens are trained: nearly all work goes into reading.",
        "Lower data.max_visual_tokens_per_image, or put several questions about an image into one row."),
    "dominates": Check("warning", "trained tokens",
        "This source gives nearly all trained tokens of an epoch; the others hardly count.",
        "Change the weights of the sources."),
    "duplicates": Check("warning", "rows",
        "Rows repeat an earlier row, both text and media.",
        "Remove them; to repeat a source on purpose, give it a weight."),
    "leak": Check("error", "rows",
        "Held-out rows are training rows as well: their loss will look too good.",
        "Remove them from one of the two files."),
    "low_fill": Check("note", "tokens of all packs",
        "Packs are not full: part of their token budget is not used.",
        "Raise data.max_tokens_per_pack, or lower it to a multiple of a usual row."),
    "short_run": Check("warning", "steps",
        "The learning rate is still warming up when the run ends.",
        "Lower optim.warmup or train.packs_per_step, or train longer."),
}  # fmt: skip
"""Each check by the name that filters and `--json` use."""


def make_finding(
    name: str,
    source: str,
    count: int,
    total: int,
    rows: list[str] | None = None,
    level: str | None = None,
    detail: str = "",
) -> Finding:
    """Write one finding out.

    name: a key of CHECKS.
    source: '' for the whole recipe.
    level: None: that of the check.
    detail: what the evidence says after the count.
    """
    check = CHECKS[name]
    evidence = f"{count:,} of {total:,} {check.unit}" + (f" ({100 * count / total:.3g}%)" if total else "")
    evidence += f"; {detail}" if detail else ""
    shown = (rows or [])[:SHOWN_ROWS]
    return Finding(name, level or check.level, source, check.message, check.remedy, evidence, count, shown)


def row_findings(source: SourceFacts, found: dict[str, list[str]], details: dict[str, str]) -> Iterator[Finding]:
    """Judge what single rows showed.

    found: check -> rows of this source that fail it.
    details: check -> what its finding says beside their number.

    A few odd boxes among many right ones are broken rows, not another convention: a note.
    """
    totals = {
        "fps_missing": source.rows,
        **dict.fromkeys(("shrunk", "enlarged"), source.rows_with_images),
        **dict.fromkeys(("boxes_pixel", "boxes_unit", "boxes_xywh"), source.rows_with_boxes),
    }
    details = {**details, **{check: _tokens_found(source, check) for check in ("added_token", "new_token")}}
    least = {"no_reasoning": _WITHOUT_REASONING, "shrunk": _MANY_ROWS, "enlarged": _MANY_ROWS}
    for name, rows in sorted(found.items()):
        total = totals.get(name, source.examined)
        few_boxes = name.startswith("boxes_") and len(rows) < _WRONG_CONVENTION * total
        if rows and len(rows) >= least.get(name, 0) * total:
            level = "note" if few_boxes else None
            yield make_finding(name, source.name, len(rows), total, rows, level, details.get(name, ""))


def _tokens_found(source: SourceFacts, check: str) -> str:
    """Return the added tokens that a check is about with their counts, the most frequent first."""
    noted = check == "added_token"
    found = [
        f"{name} {count:,}"
        for name, count in source.added_tokens.items()
        if (name in NOTED_TOKENS if noted else name not in RELEASED_TOKENS)
    ]
    more = f" and {len(found) - _SHOWN_TOKENS} more" if len(found) > _SHOWN_TOKENS else ""
    return f"{', '.join(found[:_SHOWN_TOKENS])}{more}"


def box_findings(source: SourceFacts, boxes: list[BoxEvidence]) -> Iterator[Finding]:
    """Judge the boxes of all rows together, since each alone may be right."""
    in_pixels = [one.in_pixels for one in boxes if one.in_pixels is not None]
    if len(in_pixels) >= _MANY_BOXES and all(in_pixels):
        yield make_finding("boxes_small_pixel", source.name, len(in_pixels), len(in_pixels))
    furthest = [one.furthest for one in boxes if one.furthest is not None]
    near = sum(pixel >= _NEAR_THE_END for pixel in furthest)
    if len(furthest) >= _MANY_BOXES and max(furthest) <= 1000 and near >= _MANY_ROWS * len(furthest):
        yield make_finding("boxes_shrunk", source.name, near, len(furthest))


def source_findings(source: SourceFacts) -> Iterator[Finding]:
    """Judge one source by its counts."""
    name, same = source.name, source.duplicates
    if source.num_nothing_to_learn:
        yield make_finding("nothing_to_learn", name, source.num_nothing_to_learn, source.rows, source.nothing_to_learn)
    if source.label_tokens < _FEW_LABELS * source.examined_tokens:
        yield make_finding("few_labels", name, source.label_tokens, source.examined_tokens)
    if same.count > _MANY_DUPLICATES * source.examined:
        yield make_finding("duplicates", name, same.count, source.examined, [row for row, _ in same.pairs])
    if same.leaked:
        yield make_finding("leak", name, same.leaked, source.examined, [row for row, _ in same.leaked_pairs])


def recipe_findings(sources: list[SourceFacts], packs: PackFacts, recipe: Recipe) -> Iterator[Finding]:
    """Judge the sources against each other, and the plan."""
    training = [source for source in sources if source.role == "train"]
    for group in (training, *([source] for source in sources if source.role == "eval")):
        rejected, rows = (sum(getattr(source, name) for source in group) for name in ("rejected", "rows"))
        if rejected > recipe.data.max_rejected_fraction * rows:
            yield make_finding("rejects", group[0].name if len(group) == 1 else "", rejected, rows)
    if not packs.packs:
        num_rows = sum(source.rows for source in training)
        yield make_finding("no_rows", "", num_rows, num_rows)
    names = Counter(entry.name or Path(last_part(entry.path)).stem for entry in recipe.data.eval)
    if same_names := sum(count for count in names.values() if count > 1):
        yield make_finding("same_name", "", same_names, len(recipe.data.eval))
    trained = {source.name: source.weight * source.label_tokens_of_all for source in training}
    total = sum(trained.values())
    for name, tokens in trained.items():
        if len(trained) > 1 and not packs.streamed and tokens > _DOMINATES * total:
            yield make_finding("dominates", name, round(tokens), round(total))
    if packs.mean_fill < _LOW_FILL and packs.packs > 1:
        room = packs.packs * packs.max_tokens_per_pack
        yield make_finding("low_fill", "", round(packs.mean_fill * room), room)
    warmup_steps = recipe.optim.warmup_steps(packs.num_steps)
    if packs.packs and warmup_steps >= packs.num_steps:
        yield make_finding("short_run", "", warmup_steps, packs.num_steps)
