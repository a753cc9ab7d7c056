"""Which boxes and points of a sample are drawn, and on which of its pictures."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qwen3vl_train.data.rows.sample import ImagePart, Sample, TextPart
from qwen3vl_train.inspect.boxes import box_evidence, find_boxes, find_points, label_at

_PLACEHOLDER = re.compile(r"<(box|point)>")


class Mark(NamedTuple):
    """values: x1, y1, x2, y2 of a box or x, y of a point, in thousandths. medium: its place among the media of the
    sample, from 0; None where that, or the convention of the numbers, is not certain.
    """

    values: tuple[float, ...]
    label: str
    medium: int | None


class Listed(NamedTuple):
    """A row that lists boxes or points: as a sample whose `<box>` and `<point>` are not filled, and the lists."""

    unfilled: Sample
    entries: Mapping[str, list[Any]]


def find_marks(sample: Sample, listed: Listed | None) -> list[Mark]:
    """Return the boxes and points of a sample, first those that its row lists, then those that its texts hold.

    An entry belongs to the image it names, or to the only one; one that stands in a text, to the only medium.
    """
    media = [part for message in sample.messages for part in message.content if not isinstance(part, TextPart)]
    images = [place for place, part in enumerate(media) if isinstance(part, ImagePart)]
    only = images[0] if len(images) == 1 else None if len(media) != 1 else 0
    marks: list[Mark] = []
    texts = _texts(sample)
    if listed is not None:
        entries = {kind: iter(values) for kind, values in listed.entries.items()}
        for number, unfilled in enumerate(_texts(listed.unfilled)):
            for kind, start, end in list(_filled_in(texts[number], unfilled)):
                text, entry = texts[number], next(entries[kind])
                named = entry.get("image") if isinstance(entry, dict) else None
                medium = images[named] if type(named) is int and 0 <= named < len(images) else only
                marks.append(Mark(tuple(json.loads(text[start:end])), label_at(text, end), medium))
                texts[number] = text[:start] + " " * (end - start) + text[end:]
    boxes = [box for text in texts for box in find_boxes(text)]
    certain = boxes and box_evidence(boxes, None).fault is None
    place = 0 if len(media) == 1 else None
    marks += [Mark(box[:4], box.label, place if certain else None) for box in boxes]
    return marks + [Mark(point[:2], point.label, place) for text in texts for point in find_points(text)]


def _texts(sample: Sample) -> list[str]:
    return [part.text for message in sample.messages for part in message.content if isinstance(part, TextPart)]


def _filled_in(text: str, unfilled: str) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, start, end) of what a text has for each placeholder. "in [1, 2]", "in <point>" -> point, 3, 9"""
    shift = 0
    for placeholder in _PLACEHOLDER.finditer(unfilled):
        start = placeholder.start() + shift
        end = text.index("]", start) + 1
        yield placeholder[1], start, end
        shift += end - start - len(placeholder[0])
