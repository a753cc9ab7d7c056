"""Boxes and points, written into the text in Qwen3-VL's own convention: whole numbers from 0 to 1000 of the image.

A row lists them under `boxes` and `points`; each `<box>` and `<point>` in its texts takes the next one:

    {"boxes": [[64, 48, 320, 240]], "bbox": "pixel", ... "value": '[{"bbox_2d": <box>, "label": "cup"}]'}
    -> '[{"bbox_2d": [100, 100, 500, 500], "label": "cup"}]'        for an image of 640x480

They are fractions of the image, so they hold at whatever size the model sees it; pixels count in the image as it is
shown, with its EXIF rotation applied. Where a row has several images, an entry says which one its pixels count in, from
0: {"box": [64, 48, 320, 240], "image": 1}.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.image import image_size
from qwen3vl_train.data.rows.sample import ImagePart, Part, Sample, TextPart

UNITS = ("pixel", "unit", "per_mille")
LAYOUTS = ("xyxy", "xywh")
_MARK = re.compile(r"<(box|point)>")
_PLURAL = {"box": "boxes", "point": "points"}


class Convention(NamedTuple):
    """How boxes are given. unit: pixel, unit (0 to 1), per_mille (0 to 1000), or None: not said. layout: of boxes."""

    unit: str | None = None
    layout: str = "xyxy"


NOT_SAID = Convention()


def write_boxes(sample: Sample, row: Mapping[str, Any], columns: Mapping[str, str], given: Convention) -> Sample:
    """Fill the marks of a sample from its row. columns: other names for `boxes` and `points`.

    given: that of the data set; the row's own `bbox` and `bbox_layout` go before it. Where neither says a unit and
    there are no boxes, marks are plain text. Raises RowFault when marks and boxes differ in number, or a box is not
    one, has no area, or lies outside its image by more than half a thousandth.
    """
    lists = {kind: row.get(columns.get(name, name)) for kind, name in _PLURAL.items()}
    marks = [mark for part in _parts(sample) if isinstance(part, TextPart) for mark in _MARK.findall(part.text)]
    convention = Convention(_own(row, "bbox", UNITS) or given.unit, _own(row, "bbox_layout", LAYOUTS) or given.layout)
    listed = any(values is not None for values in lists.values())
    if convention.unit is None:
        if marks and listed:
            raise RowFault(
                f"boxes of no stated convention; set bbox to {', '.join(UNITS)} in the row or the recipe",
                kind="invalid_boxes",
            )
        return sample
    size_of = _sizes(sample)
    texts = {}
    for kind, values in lists.items():
        entries = [] if values is None else values
        if not isinstance(entries, list):
            raise RowFault(f"{_PLURAL[kind]} is not a list; write a list of {_PLURAL[kind]}", kind="invalid_boxes")
        if len(entries) != (wanted := marks.count(kind)):
            raise RowFault(
                f"{len(entries)} {kind if len(entries) == 1 else _PLURAL[kind]} but {wanted} <{kind}> "
                f"mark{'s' * (wanted != 1)} in the text; write one mark for each",
                kind="invalid_boxes",
            )
        where = [f"{_PLURAL[kind]}[{place}]" for place in range(len(entries))]
        texts[kind] = iter(
            [_written(entry, kind, w, convention, size_of) for w, entry in zip(where, entries, strict=True)]
        )

    def filled(part: Part) -> Part:
        return TextPart(_MARK.sub(lambda mark: next(texts[mark[1]]), part.text)) if isinstance(part, TextPart) else part

    messages = [replace(message, content=tuple(map(filled, message.content))) for message in sample.messages]
    return replace(sample, messages=tuple(messages)) if marks else sample


def _parts(sample: Sample) -> list[Part]:
    return [part for message in sample.messages for part in message.content]


def _own(row: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str | None:
    value = row.get(key)
    if value is not None and value not in known:
        raise RowFault(
            f"{key} is {str(value)[:50]!r}; use {', '.join(known)}, and list boxes under boxes", kind="invalid_boxes"
        )
    return value


def _sizes(sample: Sample) -> Callable[[Any, str], tuple[float, float]]:
    """Return a function: (number of an image or None, who asks) -> (width, height); reads each header once."""
    images = [part for part in _parts(sample) if isinstance(part, ImagePart)]
    seen: dict[int, tuple[float, float]] = {}

    def size_of(number: Any, where: str) -> tuple[float, float]:
        if number is None and len(images) != 1:
            raise RowFault(f"{where}: in pixels of one of {len(images)} images; say which: "
                           '{"box": [...], "image": 0}', kind="invalid_boxes")  # fmt: skip
        number = 0 if number is None else number
        if type(number) is not int or not 0 <= number < len(images):
            raise RowFault(
                f"{where}: image is {str(number)[:20]} of {len(images)}; images count from 0", kind="invalid_boxes"
            )
        if number not in seen:
            try:
                height, width = image_size(images[number].image, sample.media_root)
            except MediaFault as fault:
                raise fault.at(where) from None
            seen[number] = (width, height)
        return seen[number]

    return size_of


def _written(entry: Any, kind: str, where: str, convention: Convention, size_of: Callable) -> str:
    """Return one box or point as the model writes it: "[100, 100, 500, 500]"."""
    number = None
    if isinstance(entry, dict):
        number, entry = entry.get("image"), entry.get(kind)
    values = _numbers(entry, 4 if kind == "box" else 2, where)
    shown = f"{where} {[float(f'{value:g}') for value in values]}"
    if kind == "box" and convention.layout == "xywh":
        values[2:] = [values[0] + values[2], values[1] + values[3]]
    if kind == "box" and not (values[0] < values[2] and values[1] < values[3]):
        hint = "is its layout xywh?" if convention.layout == "xyxy" else "is its layout xyxy?"
        raise RowFault(f"{shown} read as {convention.layout} has no area; {hint}", kind="invalid_boxes")
    within = "0 to 1" if convention.unit == "unit" else "0 to 1000"
    across, down = 1.0 if convention.unit == "unit" else 1000.0, 1.0 if convention.unit == "unit" else 1000.0
    if convention.unit == "pixel":
        across, down = size_of(number, where)
        within = f"its image of {across}x{down} pixels"
    scaled = [1000 * value / (down if place % 2 else across) for place, value in enumerate(values)]
    if not all(-0.5 <= value <= 1000.5 for value in scaled):
        raise RowFault(
            f"{shown} read as {convention.unit}, {convention.layout} leaves {within}; check bbox and bbox_layout",
            kind="invalid_boxes",
        )
    return str([round(value) for value in scaled])


def _numbers(entry: Any, length: int, where: str) -> list[float]:
    if not isinstance(entry, list | tuple) or len(entry) != length:
        raise RowFault(
            f"{where} is not a list of {length} numbers; write [{', '.join(['x', 'y'] * (length // 2))}]",
            kind="invalid_boxes",
        )
    try:
        values = [float(value) for value in entry if isinstance(value, int | float) and not isinstance(value, bool)]
    except OverflowError:
        values = []
    if len(values) != length or not all(math.isfinite(value) for value in values):
        raise RowFault(f"{where} is {str(entry)[:80]}, not {length} finite numbers; mend the box", kind="invalid_boxes")
    return values
