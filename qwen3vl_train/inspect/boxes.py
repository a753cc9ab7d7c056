"""Find boxes and points in text, judge the convention of their numbers, and place them on their images.

Qwen3-VL writes boxes as [x1, y1, x2, y2] in thousandths of the image's width and height, whatever its size in pixels.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qwen3vl_train.data.rows.sample import ImagePart, Sample, TextPart

_NUMBER = r"-?\d{1,7}(?:\.\d{1,9})?"
_QUAD = rf"{_NUMBER}(?:\s{{0,3}},\s{{0,3}}{_NUMBER}){{3}}"
# A list of four numbers in brackets, or the older form of two corners, (x1,y1),(x2,y2).
_BOX = re.compile(rf"\[\s{{0,3}}({_QUAD})\s{{0,3}}\]|\(({_NUMBER},\s?{_NUMBER})\),\s?\(({_NUMBER},\s?{_NUMBER})\)")
# Two numbers in brackets may be anything, so a point needs its key.
_POINT = re.compile(
    rf'"point(?:_2d)?"\s{{0,3}}:\s{{0,3}}\[\s{{0,3}}({_NUMBER})\s{{0,3}},\s{{0,3}}({_NUMBER})\s{{0,3}}\]'
)
_PLACEHOLDER = re.compile(r"<(box|point)>")
_LABEL = re.compile(r'\s*,\s*"label"\s*:\s*"([^"\\]{1,80})"')

# Sides in pixels. In smaller images, some of many boxes in thousandths end beyond the side when read as pixels; in
# larger ones, some of many boxes in pixels end beyond 1000. Between them, boxes of either kind may fit both.
_SMALL, _LARGE = 800, 1200


class Box(NamedTuple):
    """Four numbers as they were written, and the label that follows them in JSON ('' if there is none)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


class Point(NamedTuple):
    """Two numbers as they were written, and their label."""

    x: float
    y: float
    label: str = ""


class BoxEvidence(NamedTuple):
    """What the boxes of one row say about their convention.

    fault: a check of `findings.CHECKS` that their numbers fail. If there is none and the row has one image:
    in_pixels: whether every box also fits the image's size in pixels; None unless its sides are at most 800.
    furthest: the furthest end of a box in pixels, along sides of at least 1200; None if there is no such side.
    """

    fault: str | None
    in_pixels: bool | None = None
    furthest: float | None = None


class Mark(NamedTuple):
    """A box or point to draw on an image.

    values: x1, y1, x2, y2 of a box or x, y of a point, in thousandths.
    medium: index among the media of the sample; None if that, or the convention of the numbers, is not certain.
    """

    values: tuple[float, ...]
    label: str
    medium: int | None


ListedMarks = tuple[Sample, Mapping[str, list[Any]]]
"""A sample with its `<box>` and `<point>` as they are, and 'box' or 'point' -> the list that fills them."""


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of a text in order. 'cat [10, 20, 300, 400]' -> [Box(10, 20, 300, 400)]."""
    boxes = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in re.findall(_NUMBER, match[0]))
        boxes.append(Box(x1, y1, x2, y2, _label_at(text, match.end())))
    return boxes


def find_points(text: str) -> list[Point]:
    """Return the points of a text in order. '{"point_2d": [10, 20]}' -> [Point(10, 20)]."""
    return [Point(float(match[1]), float(match[2]), _label_at(text, match.end())) for match in _POINT.finditer(text)]


def _label_at(text: str, end: int) -> str:
    label = _LABEL.match(text, end)
    return label[1] if label else ""


def box_evidence(boxes: list[Box], size: tuple[int, int] | None) -> BoxEvidence:
    """Judge the boxes of one row, at least one. size: (height, width) of its only image, None for several."""
    numbers = [number for box in boxes for number in box[:4]]
    if max(numbers) > 1000 or min(numbers) < 0:
        return BoxEvidence("boxes_pixel")
    if max(numbers) <= 1 and any(number % 1 for number in numbers):
        return BoxEvidence("boxes_unit")
    if any(box.x2 < box.x1 or box.y2 < box.y1 for box in boxes):
        return BoxEvidence("boxes_xywh")
    if size is None:
        return BoxEvidence(None)
    height, width = size
    if max(size) <= _SMALL:
        return BoxEvidence(None, in_pixels=all(box.x2 <= width and box.y2 <= height for box in boxes))
    # Thousandths are rounded, so a pixel may have been half a thousandth less.
    ends = [(side, end - 0.5) for box in boxes for side, end in ((width, box.x2), (height, box.y2))]
    return BoxEvidence(None, furthest=max((side * end / 1000 for side, end in ends if side >= _LARGE), default=None))


def find_marks(sample: Sample, listed: ListedMarks | None) -> list[Mark]:
    """Return the boxes and points of a sample, first those that its row lists, then those written in its texts.

    A listed entry belongs to the image that it names, or to the only one; one written in a text, to the only medium.
    """
    media = [part for message in sample.messages for part in message.content if not isinstance(part, TextPart)]
    images = [index for index, part in enumerate(media) if isinstance(part, ImagePart)]
    only_image = images[0] if len(images) == 1 else None if len(media) != 1 else 0
    marks: list[Mark] = []
    texts = _texts(sample)
    if listed is not None:
        entries = {name: iter(values) for name, values in listed[1].items()}
        for number, unfilled in enumerate(_texts(listed[0])):
            for name, start, end in list(_filled_in(texts[number], unfilled)):
                text, entry = texts[number], next(entries[name])
                named = entry.get("image") if isinstance(entry, dict) else None
                medium = images[named] if type(named) is int and 0 <= named < len(images) else only_image
                marks.append(Mark(tuple(json.loads(text[start:end])), _label_at(text, end), medium))
                texts[number] = text[:start] + " " * (end - start) + text[end:]
    boxes = [box for text in texts for box in find_boxes(text)]
    certain = boxes and box_evidence(boxes, None).fault is None
    only_medium = 0 if len(media) == 1 else None
    marks += [Mark(box[:4], box.label, only_medium if certain else None) for box in boxes]
    return marks + [Mark(point[:2], point.label, only_medium) for text in texts for point in find_points(text)]


def _texts(sample: Sample) -> list[str]:
    return [part.text for message in sample.messages for part in message.content if isinstance(part, TextPart)]


def _filled_in(text: str, unfilled: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, end) of what replaced each placeholder. "in [1, 2]", "in <point>" -> point, 3, 9."""
    shift = 0
    for placeholder in _PLACEHOLDER.finditer(unfilled):
        start = placeholder.start() + shift
        end = text.index("]", start) + 1
        yield placeholder[1], start, end
        shift += end - start - len(placeholder[0])
