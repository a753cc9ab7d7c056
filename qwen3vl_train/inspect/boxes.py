"""Boxes written in text: where they stand, and which convention their numbers look like.

Qwen3-VL writes boxes as [x1, y1, x2, y2] in thousandths of the picture's width and height, whatever its size in pixels.
"""

import re
from typing import NamedTuple

_NUMBER = r"-?\d{1,7}(?:\.\d{1,9})?"
_QUAD = rf"{_NUMBER}(?:\s{{0,3}},\s{{0,3}}{_NUMBER}){{3}}"
# A list of four numbers in brackets, or the older form of two corners, (x1,y1),(x2,y2).
_BOX = re.compile(rf"\[\s{{0,3}}({_QUAD})\s{{0,3}}\]|\(({_NUMBER},\s?{_NUMBER})\),\s?\(({_NUMBER},\s?{_NUMBER})\)")
_LABEL = re.compile(r'\s*,\s*"label"\s*:\s*"([^"\\]{1,80})"')


class Box(NamedTuple):
    """Four numbers as they were written, and the label that stands behind them in JSON ('' where none does)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of a text in order. 'cat [10, 20, 300, 400]' -> [Box(10, 20, 300, 400)]."""
    boxes = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in re.findall(_NUMBER, match[0]))
        label = _LABEL.match(text, match.end())
        boxes.append(Box(x1, y1, x2, y2, label[1] if label else ""))
    return boxes


def convention_fault(boxes: list[Box]) -> str | None:
    """Return the kind of hazard that the numbers of a row's boxes show, or None where they may be thousandths."""
    numbers = [number for box in boxes for number in box[:4]]
    if not numbers:
        return None
    if max(numbers) > 1000 or min(numbers) < 0:
        return "boxes_pixel"
    if max(numbers) <= 1 and any(number % 1 for number in numbers):
        return "boxes_unit"
    if any(box.x2 < box.x1 or box.y2 < box.y1 for box in boxes):
        return "boxes_xywh"
    return None
