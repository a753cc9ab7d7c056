"""What can look wrong in data, each with its remedy, and the rules that say when it does."""

from typing import NamedTuple

from qwen3vl_train.config import Recipe
from qwen3vl_train.inspect.facts import SHOWN_ROWS, Hazard, PackFacts, SourceFacts

# Shares from which on something is worth a line; below them it is the ordinary unevenness of real data.
_MANY_ROWS = 0.10
_WITHOUT_REASONING = 0.05
_MANY_DUPLICATES = 0.01
_DOMINATES = 0.90
_FEW_LABELS = 0.01
_LOW_FILL = 0.90
_MANY_BOXES = 20  # rows; that the boxes of so many fit a small picture by chance is out of the question


class Kind(NamedTuple):
    """What is seen and why it matters, and what to do. unit: what is counted."""

    level: str
    hazard: str
    remedy: str
    unit: str = "rows"


KINDS: dict[str, Kind] = {
    "boxes_pixel": Kind(
        "error",
        "Boxes with coordinates below 0 or above 1000, which look like pixels. Qwen3-VL reads and writes thousandths "
        "of the picture's width and height.",
        "List them under boxes with bbox: pixel, which converts them, or write 0-1000 of the original picture.",
    ),
    "boxes_unit": Kind(
        "error",
        "Boxes with all coordinates between 0 and 1. Qwen3-VL reads and writes thousandths.",
        "List them under boxes with bbox: unit, which converts them, or multiply by 1000 and round.",
    ),
    "boxes_xywh": Kind(
        "error",
        "Boxes whose second corner lies left of or above the first, which looks like x, y, width, height. Qwen3-VL "
        "writes two corners.",
        "List them under boxes with bbox_layout: xywh, which converts them, or write [x1, y1, x2, y2].",
    ),
    "boxes_small_pixel": Kind(
        "warning",
        "Wherever a row has boxes and one picture below 1000 pixels, every box fits the picture's size in pixels. "
        "Thousandths would not.",
        "Check whether they are pixels; if so, list them under boxes with bbox: pixel, which converts them.",
    ),
    "fps_missing": Kind(
        "error",
        "Videos without a usable frame rate, from which the times of their frames follow; their rows are rejected.",
        "Write the files again with their rate; give lists of frames with fps or timestamps.",
    ),
    "rejects": Kind(
        "error",
        "More rows cannot be used than data.max_rejected_fraction allows: training will not start.",
        "Mend the rows listed under the source, or raise data.max_rejected_fraction.",
    ),
    "nothing_to_learn": Kind(
        "warning",
        "Rows without a trained token.",
        "Add answers, take out loss: false, or leave the rows out.",
    ),
    "empty_answer": Kind(
        "warning",
        "An empty answer is trained: the model learns to say nothing.",
        "Leave the rows out, or set loss: false on those messages.",
    ),
    "special_token": Kind(
        "warning",
        "Names of special tokens, such as <|image_pad|> or <|im_end|>, stand in text. Here they stay text and never "
        "become the token.",
        "Take the markup out of the data: the chat template writes it.",
    ),
    "media_mark": Kind(
        "warning",
        "A mark such as <image> or <box> stands in text; the model reads it as letters.",
        "Give the medium or box that belongs there: a part of type image, or an entry under images or boxes.",
    ),
    "no_reasoning": Kind(
        "error",
        "No reasoning in any trained answer, but the checkpoint's template is that of a Thinking model: it writes an "
        "empty <think></think>, and the model unlearns to reason.",
        "Use an Instruct checkpoint, or add reasoning_content to the answers.",
    ),
    "reasoning_on_instruct": Kind(
        "warning",
        "<think> text is trained on an Instruct checkpoint, as ordinary words of the answer.",
        "Use a Thinking checkpoint, or take the reasoning out.",
    ),
    "answers_left_out": Kind(
        "note",
        "Answers that are not trained: the Thinking template keeps reasoning only behind the last question.",
        "Write one row for each answer to train them all.",
    ),
    "shrunk": Kind(
        "warning",
        "Pictures keep less than half of their pixels; small print is lost.",
        "Raise data.max_visual_tokens_per_image, or crop the pictures.",
        "rows with pictures",
    ),
    "enlarged": Kind(
        "warning",
        "Pictures far below the minimum are enlarged more than four times: tokens that show nothing new.",
        "Lower data.min_visual_tokens_per_image, or join several small pictures into one.",
        "rows with pictures",
    ),
    "few_labels": Kind(
        "warning",
        "Few of the tokens are trained: nearly all work goes into reading.",
        "Lower data.max_visual_tokens_per_image, or put several questions about a picture into one row.",
        "tokens",
    ),
    "dominates": Kind(
        "warning",
        "This source gives nearly all trained tokens of an epoch; the others hardly count.",
        "Change the weights of the sources.",
        "trained tokens",
    ),
    "duplicates": Kind(
        "warning",
        "Rows repeat an earlier row, text and media alike.",
        "Leave them out; to repeat a source on purpose, give it a weight.",
    ),
    "leak": Kind(
        "error",
        "Held-out rows are training rows as well: their loss will look too good.",
        "Take them out of one of the two files.",
    ),
    "low_fill": Kind(
        "note",
        "Packs are not full: their free room is paid for and not used.",
        "Raise data.max_tokens_per_pack, or lower it to a multiple of a usual row.",
        "tokens of all packs",
    ),
    "short_run": Kind(
        "warning",
        "The learning rate is still warming up when the run ends.",
        "Lower optim.warmup_steps or train.packs_per_step, or train longer.",
        "steps",
    ),
}
"""What can be said of data; the key is how filters and `--json` name it."""


def make(kind: str, source: str, count: int, of: int, rows: list[str] | None = None) -> Hazard:
    """Write one hazard out. source: name, or '' for the whole recipe."""
    level, hazard, remedy, unit = KINDS[kind]
    evidence = f"{count:,} of {of:,} {unit}" + (f" ({100 * count / of:.3g}%)" if of else "")
    return Hazard(kind, level, source, hazard, remedy, evidence, count, (rows or [])[:SHOWN_ROWS])


def row_hazards(source: SourceFacts, found: dict[str, list[str]]) -> list[Hazard]:
    """Judge what single rows showed. found: kind -> rows of this source that show it."""
    few = {"no_reasoning": _WITHOUT_REASONING, "shrunk": _MANY_ROWS, "enlarged": _MANY_ROWS}
    asked = {"shrunk": source.rows_with_images, "enlarged": source.rows_with_images}
    return [
        make(kind, source.name, len(rows), asked.get(kind, source.examined), rows)
        for kind, rows in sorted(found.items())
        if rows and len(rows) >= few.get(kind, 0) * asked.get(kind, source.examined)
    ]


def source_hazards(source: SourceFacts, boxes_in_pixels: list[bool]) -> list[Hazard]:
    """Judge one source by its sums. boxes_in_pixels: one `RowFacts.boxes_in_pixels` for each row that has one."""
    name, hazards = source.name, []
    no_fps = [group for group in source.rejects if "fps" in group.reason or "frame rate" in group.reason]
    if no_fps:
        rows = [row for group in no_fps for row in group.rows]
        hazards.append(make("fps_missing", name, sum(group.count for group in no_fps), source.rows, rows))
    if source.num_nothing_to_learn:
        hazards.append(
            make("nothing_to_learn", name, source.num_nothing_to_learn, source.rows, source.nothing_to_learn)
        )
    if len(boxes_in_pixels) >= _MANY_BOXES and all(boxes_in_pixels):
        hazards.append(make("boxes_small_pixel", name, len(boxes_in_pixels), len(boxes_in_pixels)))
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
    trained = {source.name: source.weight * source.label_tokens_of_all for source in training}
    total = sum(trained.values())
    for name, tokens in trained.items():
        if len(trained) > 1 and not packs.streamed and tokens > _DOMINATES * total:
            hazards.append(make("dominates", name, round(tokens), round(total)))
    if packs.mean_fill < _LOW_FILL and packs.packs > 1:
        room = packs.packs * packs.max_tokens_per_pack
        hazards.append(make("low_fill", "", round(packs.mean_fill * room), room))
    if recipe.optim.warmup_steps >= packs.num_steps:
        hazards.append(make("short_run", "", recipe.optim.warmup_steps, packs.num_steps))
    return hazards
