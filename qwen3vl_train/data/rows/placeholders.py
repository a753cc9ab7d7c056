"""Media that a row lists separately from its texts, inserted where the questions have their placeholders.

A placeholder is `<image>` or `<video>` in a text, a typed part without its medium, or the mark of another model family.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.marks import Mark, split_marks
from qwen3vl_train.data.rows.medium import read_medium
from qwen3vl_train.data.rows.messages import Turn
from qwen3vl_train.data.rows.parts import Slot
from qwen3vl_train.data.rows.sample import ImagePart, Part, TextPart, VideoPart

_BREAK_AFTER, _BREAK_BEFORE = re.compile(r"^[^\S\n]*\n\s*"), re.compile(r"\s*\n[^\S\n]*$")


@dataclass(frozen=True)
class ListedMedia:
    """The media that a row lists, in order, as they are written there.

    options: what the row says about its only clip, such as start and end.
    folder: the row's data_path, in front of its relative paths.
    numbers: marks that name an image, with its number from 1, where the row lists its images by their marks.
    """

    image: Sequence[Any] = ()
    video: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Any = None
    numbers: Mapping[str, int] = field(default_factory=dict)

    def values(self, kind: str) -> Sequence[Any]:
        return self.image if kind == "image" else self.video

    def __bool__(self) -> bool:
        return bool(self.image or self.video)


def place_media(turns: Sequence[Turn], listed: ListedMedia, media_first: bool, ignored: list[str]) -> list[Turn]:
    """Return the turns with every medium in its place. Raise RowFault where media and placeholders differ in number.

    media_first: where no question has a placeholder, all media precede the first question.
    ignored: takes the keys that nothing reads.

    In a row with typed parts and no listed media, `<image>` and `<video>` are plain text: there the parts say where.
    A row of clips alone whose placeholders are all `<image>` means its clips (LLaVA-Video).
    """
    questions = [turn for turn in turns if _is_question(turn)]
    slots = Counter(part.kind for turn in questions for part in turn.content if isinstance(part, Slot))
    marks = [mark for turn in questions for mark in _marks(turn)]
    if listed and media_first and not slots and not marks and questions:
        first = questions[0]
        media = [Slot(kind) for kind in ("image", "video") for _ in listed.values(kind)]
        turns = [replace(turn, content=(*media, *turn.content)) if turn is first else turn for turn in turns]
        marks = []
    if not listed and not marks and not slots:
        return list(turns)
    placer = _Placer(
        listed,
        literal=not listed and any(turn.typed for turn in questions) and not slots,
        image_means_video=not listed.image
        and len(listed.video) == sum(mark.kind == "image" for mark in marks) + slots["image"]
        and not any(mark.kind == "video" for mark in marks)
        and not slots["video"],
        ignored=ignored,
    )
    placed = [placer.fill(turn) if _is_question(turn) else turn for turn in turns]
    placer.check()
    return placed


def _is_question(turn: Turn) -> bool:
    return turn.role in ("user", "tool")


def _marks(turn: Turn) -> list[Mark]:
    pieces = (piece for part in turn.content if isinstance(part, TextPart) for piece in split_marks(part.text))
    return [piece for piece in pieces if isinstance(piece, Mark)]


class _Placer:
    """Fills the placeholders of one row's questions in order, and counts them.

    literal: `<image>` and `<video>` are plain text.
    image_means_video: `<image>` takes the next clip.
    """

    def __init__(self, listed: ListedMedia, literal: bool, image_means_video: bool, ignored: list[str]) -> None:
        self.listed, self.literal, self.ignored = listed, literal, ignored
        self.kinds = {"image": "video" if image_means_video and listed else "image", "video": "video"}
        self.num_wanted: Counter[str] = Counter()  # placeholders of each kind
        self.num_own = 0  # parts with a medium of their own
        self.num_empty = 0  # parts without
        self.numbers: list[tuple[str, int]] = []  # media that marks name by number

    def fill(self, turn: Turn) -> Turn:
        """Return a question with its placeholders filled, as far as there are media for them."""
        own = [part for part in turn.content if isinstance(part, ImagePart | VideoPart)]
        foreign = [mark for mark in _marks(turn) if not mark.is_ours and mark.path is None]
        moves = bool(own) and not self.listed and [_kind(part) for part in own] == [mark.kind for mark in foreign]
        queue = iter(own)
        content: list[Part | Slot] = []
        for part in turn.content:
            where = f"{turn.where}.content[{len(content)}]"
            if isinstance(part, Slot):
                self.num_empty += 1
                content.append(self._take(part.kind, None, part.options, where))
            elif isinstance(part, TextPart):
                for piece in _trim(split_marks(part.text), self.literal):
                    where = f"{turn.where}.content[{len(content)}]"
                    if not isinstance(piece, Mark):
                        content.append(TextPart(piece))
                    elif moves and not piece.is_ours and piece.path is None:
                        content.append(next(queue))
                    else:
                        content.append(self._of_mark(piece, where))
            elif not moves:
                self.num_own += 1
                content.append(part)
        return replace(turn, content=tuple(content))

    def _of_mark(self, mark: Mark, where: str) -> Part | Slot:
        if mark.path is not None:
            return self._read(mark.kind, mark.path, {}, where)
        if not mark.is_ours and not self.listed:
            raise RowFault(
                f"{where}: {mark.text[:40]} is the mark of another model family, and the row has no {mark.kind} for "
                f"it; list one {mark.kind} for each mark, or take the mark out",
                kind="media_mismatch",
            )
        return self._take(mark.kind, self.listed.numbers.get(mark.text, mark.number), {}, where)

    def _take(self, kind: str, number: int | None, options: Mapping[str, Any], where: str) -> Part | Slot:
        """Return the next medium of a kind, or that of a number; a slot after the last, which `check` reports."""
        kind = self.kinds[kind]
        index = self.num_wanted[kind]
        self.num_wanted[kind] += 1
        if number is not None:
            if (kind, number) in self.numbers:
                fault = f"{where}: {kind} {number} has two placeholders; the model sees each {kind} once"
                raise RowFault(fault, kind="media_mismatch")
            self.numbers.append((kind, number))
            index = number - 1
        values = self.listed.values(kind)
        if not 0 <= index < len(values):
            return Slot(kind, options)
        return self._read(kind, values[index], {**(self.listed.options if kind == "video" else {}), **options}, where)

    def _read(self, kind: str, value: Any, options: Mapping[str, Any], where: str) -> ImagePart | VideoPart:
        return read_medium(kind, _join_folder(self.listed.folder, value), options, where, self.ignored)

    def check(self) -> None:
        """Raise RowFault where placeholders and listed media differ in number."""
        for kind in ("image", "video"):
            num_listed, wanted = len(self.listed.values(kind)), self.num_wanted[kind]
            if num_listed == wanted:
                continue
            remedy = f"list one {kind} for each, or write typed parts, in which a text is a text"
            if self.num_empty:
                remedy = f"list one {kind} for each part without its own, or write it into the part"
            if num_listed:
                remedy = f"put one placeholder where each {kind} belongs"
            if (own := self.num_own) > 0:
                remedy = f"the parts contain {own} of their own: list no others, or leave parts without media for them"
            given = f"{num_listed} {kind}{'s' * (num_listed != 1)}"
            placeholders = f"{wanted} <{kind}> placeholder{'s' * (wanted != 1)} in the questions"
            raise RowFault(f"{given} but {placeholders}; {remedy}", kind="media_mismatch")


def _kind(part: ImagePart | VideoPart) -> str:
    return "image" if isinstance(part, ImagePart) else "video"


def _trim(pieces: list[str | Mark], literal: bool) -> list[str | Mark]:
    """Remove the line break next to a mark, with the blanks around it, and texts that are then empty.

    literal: our own placeholders are plain text.
    "<image>", "\\nWhat?" -> "<image>", "What?"; "Is ", "<image>", " red?" stays.
    """
    if literal:
        joined: list[str | Mark] = [""]
        for piece in pieces:
            if isinstance(piece, Mark) and not piece.is_ours:
                joined += [piece, ""]
            else:
                last = joined[-1]
                assert isinstance(last, str), joined
                joined[-1] = last + (piece.text if isinstance(piece, Mark) else piece)
        pieces = joined
    trimmed: list[str | Mark] = []
    for index, piece in enumerate(pieces):
        if isinstance(piece, str):
            piece = _BREAK_AFTER.sub("", piece) if index > 0 else piece
            piece = _BREAK_BEFORE.sub("", piece) if index + 1 < len(pieces) else piece
        if piece:
            trimmed.append(piece)
    return trimmed


def _join_folder(folder: Any, value: Any) -> Any:
    """Prepend a row's data_path to a path, or to each frame of a list or of {"frames": [...], "fps": 2}."""
    if not folder:
        return value
    if isinstance(value, list):
        return [_join_folder(folder, item) for item in value]
    if isinstance(value, dict):
        return {key: _join_folder(folder, item) if key in ("frames", "path") else item for key, item in value.items()}
    if not isinstance(value, str) or value.startswith("data:") or "://" in value:
        return value
    if not isinstance(folder, str):
        raise RowFault("data_path is not a path; write a folder", kind="wrong_type")
    return os.path.join(folder, value)
