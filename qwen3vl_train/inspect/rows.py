"""Check one row by its text and the headers of its media; no pixel is decoded."""

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
_PLACEHOLDER = re.compile(r"</?(?:image|video|img|box|point)>|<(?:image|video)_?\d{1,4}>")

# Pixels that the model sees over pixels of the file; between these, an image looks much as it did.
_SHRUNK, _ENLARGED = 0.5, 4.0


@dataclass(frozen=True)
class RowFacts:
    """One usable row.

    shape: how the row was written, a member of `rows.formats.FORMATS`.
    turns: number of assistant messages.
    label_tokens: number of tokens that are trained.
    sizes: (height, width) of each image.
    failed_checks: keys of `findings.CHECKS`.
    key: equal for rows of equal text and equal media sizes.
    boxes: None if the row has no image or no box.
    """

    shape: str
    turns: int
    label_tokens: int
    sizes: list[tuple[int, int]]
    videos: int
    failed_checks: frozenset[str]
    key: bytes
    boxes: BoxEvidence | None


def read_row(sample: Sample, visual_tokens: int, collate: MultimodalCollator) -> RowFacts:
    """Check one sample. visual_tokens: its cost in the index. Raises RowFault if media cannot be read."""
    dialect = collate.dialect
    pieces = DIALECTS[dialect](sample.messages, sample.tools, generation_prompt=False)
    slots = [piece.part for piece in pieces if isinstance(piece, Slot)]
    media = [measure(part, collate.budgets, sample.media_root).size for part in slots]
    sizes = [(size.height, size.width) for size in media if not size.num_frames]
    videos = len(media) - len(sizes)
    # Media are never next to trained text, so a layout without them has the same trained tokens.
    layout = lay_out([piece for piece in pieces if not isinstance(piece, Slot)], [], collate.tokenizer)
    trained_turns = sum(isinstance(piece, Special) and piece.weight > 0 for piece in pieces)
    boxes = find_boxes("\n".join(message.text for message in sample.messages)) if sizes else []
    evidence = box_evidence(boxes, sizes[0] if len(media) == 1 else None) if boxes else None
    failed = _failed_text_checks(sample.messages, dialect, trained_turns)
    if evidence and evidence.fault:
        failed.add(evidence.fault)
    if sizes and not videos:
        kept = visual_tokens * FACTOR**2 / sum(height * width for height, width in sizes)
        failed |= {"shrunk"} if kept < _SHRUNK else {"enlarged"} if kept > _ENLARGED else set()
    return RowFacts(
        shape=sample.row_format,
        turns=sum(message.role == "assistant" for message in sample.messages),
        label_tokens=sum(weight > 0 for weight in layout.weights),
        sizes=sizes,
        videos=videos,
        failed_checks=frozenset(failed),
        key=_key(sample, media),
        boxes=evidence,
    )


def _failed_text_checks(messages: tuple[Message, ...], dialect: str, trained_turns: int) -> set[str]:
    texts = [part.text for message in messages for part in message.content if isinstance(part, TextPart)]
    trained = [message for message in messages if message.loss_weight > 0]
    thinks = [message.reasoning is not None or "</think>" in message.text for message in trained]
    fails = {
        "special_token": any(_SPECIAL.search(text) for text in texts),
        "media_mark": any(_PLACEHOLDER.search(text) for text in texts),
        "empty_answer": any(not message.text.strip() and not message.tool_calls for message in trained),
        "no_reasoning": dialect == "thinking" and trained and not any(thinks),
        "reasoning_on_instruct": dialect == "instruct" and any(thinks),
        "answers_left_out": trained_turns < len(trained),
    }
    return {check for check in fails if fails[check]}


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
    content = json.dumps([text, sample.tools, media], ensure_ascii=False, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
