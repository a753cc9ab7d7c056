"""Boxes and points written in text: where they stand, and which convention the numbers of boxes look like.

Qwen3-VL writes boxes as [x1, y1, x2, y2] in thousandths of the picture's width and height, whatever its size in pixels.
"""

import re
from typing import NamedTuple

_NUMBER = r"-?\d{1,7}(?:\.\d{1,9})?"
_QUAD = rf"{_NUMBER}(?:\s{{0,3}},\s{{0,3}}{_NUMBER}){{3}}"
# A list of four numbers in brackets, or the older form of two corners, (x1,y1),(x2,y2).
_BOX = re.compile(rf"\[\s{{0,3}}({_QUAD})\s{{0,3}}\]|\(({_NUMBER},\s?{_NUMBER})\),\s?\(({_NUMBER},\s?{_NUMBER})\)")
# Two numbers in brackets are anything; as a point they have a name.
_POINT = re.compile(
    rf'"point(?:_2d)?"\s{{0,3}}:\s{{0,3}}\[\s{{0,3}}({_NUMBER})\s{{0,3}},\s{{0,3}}({_NUMBER})\s{{0,3}}\]'
)
_LABEL = re.compile(r'\s*,\s*"label"\s*:\s*"([^"\\]{1,80})"')

# Sides in pixels. Of smaller pictures, some of many boxes in thousandths end beyond the side when read as pixels; of
# larger ones, some of many boxes in pixels end beyond 1000. In between, both may keep within both.
_SMALL, _LARGE = 800, 1200


class Box(NamedTuple):
    """Four numbers as they were written, and the label that stands behind them in JSON ('' where none does)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


class Point(NamedTuple):
    """Two numbers as they were written, and the label behind them."""

    x: float
    y: float
    label: str = ""


class BoxEvidence(NamedTuple):
    """What the boxes of one row say of their convention.

    fault: a kind of hazard that their numbers show. Where there is none and the row has one picture, else None:
    in_pixels, whether every box also lies within the picture's size in pixels, of a picture of at most 800 a side;
    furthest, where the box that goes furthest would end in pixels, along the sides of at least 1200.
    """

    fault: str | None
    in_pixels: bool | None = None
    furthest: float | None = None


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of a text in order. 'cat [10, 20, 300, 400]' -> [Box(10, 20, 300, 400)]."""
    boxes = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in re.findall(_NUMBER, match[0]))
        boxes.append(Box(x1, y1, x2, y2, label_at(text, match.end())))
    return boxes


def find_points(text: str) -> list[Point]:
    """Return the points of a text in order. '{"point_2d": [10, 20]}' -> [Point(10, 20)]."""
    return [Point(float(match[1]), float(match[2]), label_at(text, match.end())) for match in _POINT.finditer(text)]


def label_at(text: str, place: int) -> str:
    """Return the label that a box or point ending at a place has in JSON, '' where it has none."""
    label = _LABEL.match(text, place)
    return label[1] if label else ""


def box_evidence(boxes: list[Box], size: tuple[int, int] | None) -> BoxEvidence:
    """Judge the boxes of one row, of which there is at least one. size: (height, width) of its only picture."""
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
    # Thousandths are rounded, so that a pixel is at least half a thousandth before what it became.
    ends = [(side, end - 0.5) for box in boxes for side, end in ((width, box.x2), (height, box.y2))]
    return BoxEvidence(None, furthest=max((side * end / 1000 for side, end in ends if side >= _LARGE), default=None))
