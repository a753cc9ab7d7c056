"""What one row says about itself, from its text and the headers of its media; no pixel is decoded."""

import hashlib
import json
import re
from dataclasses import dataclass

from qwen3vl_train.data.encode.chat import DIALECTS, Slot, Special
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import lay_out
from qwen3vl_train.data.encode.media import measure
from qwen3vl_train.data.media.budgets import Size
from qwen3vl_train.data.media.image import FACTOR
from qwen3vl_train.data.rows.sample import Message, Sample, TextPart
from qwen3vl_train.inspect.boxes import BoxEvidence, box_evidence, find_boxes

_SPECIAL = re.compile(r"<\|[A-Za-z_]{2,40}\|>")
_MEDIA_MARK = re.compile(r"</?(?:image|video|img|box|point)>|<(?:image|video)_?\d{1,4}>")

# Pixels the model sees over pixels of the file; between these, a picture looks much as it did.
_SHRUNK, _ENLARGED = 0.5, 4.0


@dataclass(frozen=True)
class RowFacts:
    """One usable row.

    shape: how the row was written, a member of `formats.FORMATS`. turns: assistant messages. label_tokens: tokens that
    are trained. sizes: (height, width) of each still. hazards: kinds of `kinds.KINDS` that this row shows. key: equal
    for rows of equal text and equal media sizes. boxes: None where the row has no picture or no box.
    """

    shape: str
    turns: int
    label_tokens: int
    sizes: list[tuple[int, int]]
    videos: int
    hazards: frozenset[str]
    key: bytes
    boxes: BoxEvidence | None


def read_row(sample: Sample, visual_tokens: int, collate: MultimodalCollator) -> RowFacts:
    """Look at one sample. visual_tokens: what the index says it costs. Raises RowFault where media cannot be read."""
    dialect = collate.encoder.dialect
    pieces = DIALECTS[dialect](sample.messages, sample.tools, generation_prompt=False)
    slots = [piece.part for piece in pieces if isinstance(piece, Slot)]
    media = [measure(part, collate.encoder.budgets.clips, sample.media_root).size for part in slots]
    sizes = [(size.height, size.width) for size in media if not size.num_frames]
    videos = len(media) - len(sizes)
    # Media never stand beside a trained text, so leaving them out changes no trained token.
    layout = lay_out([piece for piece in pieces if not isinstance(piece, Slot)], [], collate.tokenizer)
    trained_turns = sum(isinstance(piece, Special) and piece.weight > 0 for piece in pieces)
    boxes = find_boxes("\n".join(message.text for message in sample.messages)) if sizes else []
    evidence = box_evidence(boxes, sizes[0] if len(media) == 1 else None) if boxes else None
    found = _text_hazards(sample.messages, dialect, trained_turns)
    if evidence and evidence.fault:
        found.add(evidence.fault)
    if sizes and not videos:
        kept = visual_tokens * FACTOR**2 / sum(height * width for height, width in sizes)
        found |= {"shrunk"} if kept < _SHRUNK else {"enlarged"} if kept > _ENLARGED else set()
    return RowFacts(
        shape=sample.row_format,
        turns=sum(message.role == "assistant" for message in sample.messages),
        label_tokens=sum(weight > 0 for weight in layout.weights),
        sizes=sizes,
        videos=videos,
        hazards=frozenset(found),
        key=_key(sample, media),
        boxes=evidence,
    )


def _text_hazards(messages: tuple[Message, ...], dialect: str, trained_turns: int) -> set[str]:
    found = set()
    texts = [part.text for message in messages for part in message.content if isinstance(part, TextPart)]
    if any(_SPECIAL.search(text) for text in texts):
        found.add("special_token")
    if any(_MEDIA_MARK.search(text) for text in texts):
        found.add("media_mark")
    trained = [message for message in messages if message.loss_weight > 0]
    if any(not message.text.strip() and not message.tool_calls for message in trained):
        found.add("empty_answer")
    thinks = [message.reasoning is not None or "</think>" in message.text for message in trained]
    if dialect == "thinking" and trained and not any(thinks):
        found.add("no_reasoning")
    if dialect == "instruct" and any(thinks):
        found.add("reasoning_on_instruct")
    if trained_turns < len(trained):
        found.add("answers_left_out")
    return found


def _key(sample: Sample, media: list[Size]) -> bytes:
    text = [
        [
            message.role,
            [part.text if isinstance(part, TextPart) else None for part in message.content],
            [[call.name, call.arguments] for call in message.tool_calls],
            message.reasoning,
        ]
        for message in sample.messages
    ]
    whole = json.dumps([text, sample.tools, media], ensure_ascii=False, default=str)
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
