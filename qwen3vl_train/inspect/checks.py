"""What can look wrong in data, each with its remedy."""

from typing import NamedTuple


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
        "rows with boxes",
    ),
    "boxes_unit": Kind(
        "error",
        "Boxes with all coordinates between 0 and 1. Qwen3-VL reads and writes thousandths.",
        "List them under boxes with bbox: unit, which converts them, or multiply by 1000 and round.",
        "rows with boxes",
    ),
    "boxes_xywh": Kind(
        "error",
        "Boxes whose second corner lies left of or above the first, which looks like x, y, width, height. Qwen3-VL "
        "writes two corners.",
        "List them under boxes with bbox_layout: xywh, which converts them, or write [x1, y1, x2, y2].",
        "rows with boxes",
    ),
    "boxes_small_pixel": Kind(
        "warning",
        "Wherever a row has boxes and one picture of at most 800 pixels a side, every box fits the picture's size in "
        "pixels. Thousandths would not.",
        "Check whether they are pixels; if so, list them under boxes with bbox: pixel, which converts them.",
        "rows with boxes and one small picture",
    ),
    "boxes_shrunk": Kind(
        "warning",
        "Boxes of pictures larger than 1000 pixels reach nearly to pixel 1000, and never beyond. Thousandths that were "
        "taken for pixels do that: they were scaled down a second time.",
        "Look at a sample: if its boxes are too small and too far to the left and top, declare bbox: per_mille.",
        "rows with boxes and one large picture",
    ),
    "fps_missing": Kind(
        "error",
        "Videos without a usable frame rate, from which the times of their frames follow; their rows are rejected.",
        "Write the files again with their rate; give lists of frames with fps or timestamps.",
    ),
    "undecodable": Kind(
        "error",
        "Rows that looked sound break when their media are decoded; training will reject them when it comes to them.",
        "Mend or leave out the rows; look at more of them with --samples.",
        "samples shown",
    ),
    "no_rows": Kind(
        "error",
        "No training row can be used: there is nothing to train on.",
        "Mend the rows: the reasons are listed under each source.",
    ),
    "same_name": Kind(
        "error",
        "Held-out data sets share a name, which is that of their file where none is given: training will not start.",
        "Give each entry under data.eval a name of its own.",
        "data sets",
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
