"""Boxes and points, written into the text in Qwen3-VL's own convention: integers from 0 to 1000 of the image.

A row lists them under `boxes` and `points`; each `<box>` and `<point>` placeholder in its texts takes the next one:

    {"boxes": [[64, 48, 320, 240]], "bbox": "pixel", ... "value": '[{"bbox_2d": <box>, "label": "cup"}]'}
    -> '[{"bbox_2d": [100, 100, 500, 500], "label": "cup"}]'        for an image of 640x480

They are fractions of the image, so they hold at whatever size the model sees it. Pixels refer to the image as it is
shown, with its EXIF rotation applied. Where a row has several images, an entry says which one its pixels refer to,
counted from 0: {"box": [64, 48, 320, 240], "image": 1}.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.image import image_size
from qwen3vl_train.data.rows.messages import is_number
from qwen3vl_train.data.rows.sample import ImagePart, Part, Sample, TextPart

UNITS = ("pixel", "unit", "per_mille")  # unit: 0 to 1; per_mille: 0 to 1000
LAYOUTS = ("xyxy", "xywh")
_PLACEHOLDER = re.compile(r"<(box|point)>")
_PLURAL = {"box": "boxes", "point": "points"}


class _BoxFault(RowFault):
    default_kind = "invalid_boxes"


class Convention(NamedTuple):
    """How boxes are given. unit: one of UNITS, or None: not stated. layout: one of LAYOUTS."""

    unit: str | None = None
    layout: str = "xyxy"


NO_CONVENTION = Convention()


def fill_boxes(sample: Sample, row: Mapping[str, Any], columns: Mapping[str, str], default: Convention) -> Sample:
    """Replace the placeholders of a sample by the boxes and points of its row.

    columns: other names for the columns `boxes` and `points`.
    default: the convention of the data set; the row's own `bbox` and `bbox_layout` take precedence.
    Where neither states a unit and there are no boxes, placeholders are plain text. Raise RowFault when placeholders
    and boxes differ in number, or a box is malformed, has no area, or lies outside its image by more than 0.5/1000.
    """
    columns_of = {kind: row.get(columns.get(plural, plural)) for kind, plural in _PLURAL.items()}
    found = [match for part in sample.parts if isinstance(part, TextPart) for match in _PLACEHOLDER.findall(part.text)]
    unit, layout = _row_setting(row, "bbox", UNITS), _row_setting(row, "bbox_layout", LAYOUTS)
    convention = Convention(unit or default.unit, layout or default.layout)
    if convention.unit is None:
        if found and any(values is not None for values in columns_of.values()):
            fault = f"boxes without a stated convention; set bbox to {', '.join(UNITS)} in the row or the recipe"
            raise _BoxFault(fault)
        return sample
    size_of = _image_sizes(sample)
    texts = {}
    for kind, values in columns_of.items():
        entries, plural = [] if values is None else values, _PLURAL[kind]
        if not isinstance(entries, list):
            raise _BoxFault(f"{plural} is not a list; write a list of {plural}")
        if len(entries) != (wanted := found.count(kind)):
            raise _BoxFault(
                f"{len(entries)} {kind if len(entries) == 1 else plural} but {wanted} <{kind}> "
                f"placeholder{'s' * (wanted != 1)} in the text; write one placeholder for each"
            )
        texts[kind] = iter(
            [_format(entry, kind, f"{plural}[{index}]", convention, size_of) for index, entry in enumerate(entries)]
        )

    def fill(part: Part) -> Part:
        if not isinstance(part, TextPart):
            return part
        return TextPart(_PLACEHOLDER.sub(lambda match: next(texts[match[1]]), part.text))

    messages = [replace(message, content=tuple(map(fill, message.content))) for message in sample.messages]
    return replace(sample, messages=tuple(messages)) if found else sample


def _row_setting(row: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str | None:
    value = row.get(key)
    if value is not None and value not in known:
        raise _BoxFault(f"{key} is {str(value)[:50]!r}; use {', '.join(known)}, and list boxes under boxes")
    return value


def _image_sizes(sample: Sample) -> Callable[[Any, str], tuple[float, float]]:
    """Return a function: (index of an image or None, where) -> (width, height); it reads each header once."""
    images = [part for part in sample.parts if isinstance(part, ImagePart)]
    sizes: dict[int, tuple[float, float]] = {}

    def size_of(index: Any, where: str) -> tuple[float, float]:
        if index is None and len(images) != 1:
            fault = f'{where}: in pixels of one of {len(images)} images; say which: {{"box": [...], "image": 0}}'
            raise _BoxFault(fault)
        index = 0 if index is None else index
        if type(index) is not int or not 0 <= index < len(images):
            raise _BoxFault(f"{where}: image is {str(index)[:20]} of {len(images)}; images count from 0")
        if index not in sizes:
            try:
                height, width = image_size(images[index].image, sample.media_root)
            except MediaFault as fault:
                raise fault.at(where) from None
            sizes[index] = (width, height)
        return sizes[index]

    return size_of


def _format(entry: Any, kind: str, where: str, convention: Convention, size_of: Callable) -> str:
    """Return one box or point as the model writes it: "[100, 100, 500, 500]"."""
    image = None
    if isinstance(entry, dict):
        image, entry = entry.get("image"), entry.get(kind)
    values = _numbers(entry, 4 if kind == "box" else 2, where)
    shown = f"{where} {[float(f'{value:g}') for value in values]}"
    if kind == "box" and convention.layout == "xywh":
        values[2:] = [values[0] + values[2], values[1] + values[3]]
    if kind == "box" and not (values[0] < values[2] and values[1] < values[3]):
        other = "xywh" if convention.layout == "xyxy" else "xyxy"
        raise _BoxFault(f"{shown} read as {convention.layout} has no area; is its layout {other}?")
    if convention.unit == "pixel":
        width, height = size_of(image, where)
        bounds = f"its image of {width}x{height} pixels"
    else:
        width = height = 1.0 if convention.unit == "unit" else 1000.0
        bounds = f"0 to {width:g}"
    scaled = [1000 * value / (height if axis % 2 else width) for axis, value in enumerate(values)]
    if not all(-0.5 <= value <= 1000.5 for value in scaled):
        read_as = f"{convention.unit}, {convention.layout}"
        raise _BoxFault(f"{shown} read as {read_as} leaves {bounds}; check bbox and bbox_layout")
    return str([round(value) for value in scaled])


def _numbers(entry: Any, length: int, where: str) -> list[float]:
    if not isinstance(entry, list | tuple) or len(entry) != length:
        raise _BoxFault(f"{where} is not a list of {length} numbers; write [{', '.join(['x', 'y'] * (length // 2))}]")
    values = [float(value) for value in entry if is_number(value)]
    if len(values) != length:
        raise _BoxFault(f"{where} is {str(entry)[:80]}, not {length} finite numbers; fix the box")
    return values
