"""Check one row by its text and the headers of its media; no pixel is decoded."""

import hashlib
import json
import re
from dataclasses import dataclass

from PIL import Image

from qwen3vl_train.data.encode.chat import DIALECTS, Slot, Special
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import lay_out
from qwen3vl_train.data.encode.media import measure
from qwen3vl_train.data.encode.tokenizer import RELEASED_TOKENS, SPECIAL_TOKENS, ChatTokenizer
from qwen3vl_train.data.media.budgets import Size
from qwen3vl_train.data.media.image import FACTOR
from qwen3vl_train.data.rows.marks import foreign_marks
from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, TextPart
from qwen3vl_train.inspect.boxes import BoxEvidence, box_evidence, find_boxes

_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]{2,40}\|>")
_PLACEHOLDER = re.compile(r"</?(?:image|video|img|box|point)>|<video_?\d{1,4}>")

# Released added tokens that are no chat markup, without the tags of reasoning and tools, which texts are full of.
NOTED_TOKENS = {name for name in RELEASED_TOKENS - set(SPECIAL_TOKENS) if not re.search("think|tool_", name)}

# Pixels that the model sees over pixels of the file; between these, an image looks much as it did.
_SHRUNK, _ENLARGED = 0.5, 4.0


@dataclass(frozen=True)
class RowFacts:
    """One usable row.

    row_format: a member of `rows.formats.FORMATS`.
    turns: number of assistant messages.
    label_tokens: number of tokens that are trained.
    added_tokens: name of an added token other than chat markup -> how often it is in the texts.
    sizes: (height, width) of each image.
    failed_checks: keys of `findings.CHECKS`.
    foreign_marks: marks of media of other model families in its texts.
    ignored: see `Sample.ignored`.
    first_medium: equal for rows that begin with the same image or clip; None where they begin with other turns.
    text_before: equal for rows with the same text before that medium; empty where there is none.
    key: equal for rows of equal text and equal media sizes.
    boxes: None if the row has no image or no box.
    """

    row_format: str
    turns: int
    label_tokens: int
    added_tokens: dict[str, int]
    sizes: list[tuple[int, int]]
    videos: int
    failed_checks: frozenset[str]
    foreign_marks: tuple[str, ...]
    ignored: tuple[str, ...]
    first_medium: bytes | None
    text_before: bytes
    key: bytes
    boxes: BoxEvidence | None


def read_row(sample: Sample, visual_tokens: int, collate: MultimodalCollator) -> RowFacts:
    """Check one sample. visual_tokens: its cost in the index. Raises RowFault if media cannot be read."""
    dialect = collate.dialect
    pieces = DIALECTS[dialect](sample.messages, sample.tools, generation_prompt=False)
    slots = [piece.part for piece in pieces if isinstance(piece, Slot)]
    measured = [measure(part, collate.budgets, sample.media_root) for part in slots]
    media = [medium.size for medium in measured]
    sizes = [(size.height, size.width) for size in media if not size.num_frames]
    videos = len(media) - len(sizes)
    # Media are never next to trained text, so a layout without them has the same trained tokens.
    layout = lay_out([piece for piece in pieces if not isinstance(piece, Slot)], [], collate.tokenizer)
    trained_turns = sum(isinstance(piece, Special) and piece.weight > 0 for piece in pieces)
    boxes = find_boxes("\n".join(message.text for message in sample.messages)) if sizes else []
    evidence = box_evidence(boxes, sizes[0] if len(media) == 1 else None) if boxes else None
    texts = [part.text for message in sample.messages for part in message.content if isinstance(part, TextPart)]
    added_tokens = _added_tokens(texts, layout.ids, collate.tokenizer)
    failed = _failed_text_checks(sample.messages, dialect, trained_turns) | _failed_token_checks(texts, added_tokens)
    if evidence and evidence.fault:
        failed.add(evidence.fault)
    if any(medium.uneven for medium in measured):
        failed.add("uneven_clip")
    if sizes and not videos:
        kept = visual_tokens * FACTOR**2 / sum(height * width for height, width in sizes)
        failed |= {"shrunk"} if kept < _SHRUNK else {"enlarged"} if kept > _ENLARGED else set()
    marks = tuple(mark for part in sample.parts if isinstance(part, TextPart) for mark in foreign_marks(part.text))
    if marks:
        failed.add("foreign_mark")
    first_medium, text_before = _beginning(sample)
    return RowFacts(
        row_format=sample.row_format,
        turns=sum(message.role == "assistant" for message in sample.messages),
        label_tokens=sum(weight > 0 for weight in layout.weights),
        added_tokens=added_tokens,
        sizes=sizes,
        videos=videos,
        failed_checks=frozenset(failed),
        foreign_marks=marks,
        ignored=sample.ignored,
        first_medium=first_medium,
        text_before=text_before,
        key=_key(sample, media),
        boxes=evidence,
    )


def _failed_text_checks(messages: tuple[Message, ...], dialect: str, trained_turns: int) -> set[str]:
    texts = [part.text for message in messages for part in message.content if isinstance(part, TextPart)]
    trained = [message for message in messages if message.loss_weight > 0]
    thinks = [message.reasoning is not None or "</think>" in message.text for message in trained]
    fails = {
        "media_mark": any(_PLACEHOLDER.search(text) for text in texts),
        "empty_answer": any(not message.text.strip() and not message.tool_calls for message in trained),
        "no_reasoning": dialect == "thinking" and trained and not any(thinks),
        "reasoning_on_instruct": dialect == "instruct" and any(thinks),
        "answers_left_out": trained_turns < len(trained),
    }
    return {check for check in fails if fails[check]}


def _beginning(sample: Sample) -> tuple[bytes | None, bytes]:
    """Return a hash of the first medium of the first question, None if it has none, and one of the text before it."""
    question = next((message for message in sample.messages if message.role != "system"), None)
    text = ""
    for part in question.content if question else ():
        if isinstance(part, TextPart):
            text += part.text
            continue
        medium = part.image if isinstance(part, ImagePart) else part.video
        first = medium[0] if isinstance(medium, tuple) else medium
        content = first.tobytes() if isinstance(first, Image.Image) else first
        named = content if isinstance(content, bytes) else repr((sample.media_root, content)).encode()
        return _hash(named), _hash(text.encode()) if text.strip() else b""
    return None, b""


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _added_tokens(texts: list[str], ids: list[int], tokenizer: ChatTokenizer) -> dict[str, int]:
    """Count added tokens in texts. ids: of the whole conversation, in which the template has written some too."""
    found = {name for token in set(ids) if (name := tokenizer.added_tokens.get(token))}
    return {name: count for name in sorted(found) if (count := sum(text.count(name) for text in texts))}


def _failed_token_checks(texts: list[str], added_tokens: dict[str, int]) -> set[str]:
    names = {name for text in texts for name in _SPECIAL.findall(text) if not foreign_marks(name)}
    fails = {
        "special_token": names & set(SPECIAL_TOKENS),
        "unknown_token": names - set(SPECIAL_TOKENS) - added_tokens.keys(),
        "added_token": added_tokens.keys() & NOTED_TOKENS,
        "new_token": added_tokens.keys() - RELEASED_TOKENS,
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
    return _hash(content.encode())
