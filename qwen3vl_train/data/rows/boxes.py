"""Boxes and points, written into the text in Qwen3-VL's own convention: integers from 0 to 1000 of the image.

A row lists them under `boxes` and `points`; each `<box>` and `<point>` placeholder in its texts takes the next one:

    {"boxes": [[64, 48, 320, 240]], "bbox": "pixel", ... "value": '[{"bbox_2d": <box>, "label": "cup"}]'}
    -> '[{"bbox_2d": [100, 100, 500, 500], "label": "cup"}]'        for an image of 640x480

They are fractions of the image, so they hold at whatever size the model sees it. Pixels refer to the image as it is
shown, with its EXIF rotation applied. Where a row has several images, an entry says which one its pixels refer to,
counted from 0: {"box": [64, 48, 320, 240], "image": 1}.

Rows of ms-swift have `<ref-object>` and `<bbox>` in place of these, and their values in an object of the row:

    {"objects": {"ref": ["the cup"], "bbox": [[64, 48, 320, 240]], "bbox_type": "real"}}
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.image import ANY_SIZE, image_size
from qwen3vl_train.data.rows.formats import Columns, column_names
from qwen3vl_train.data.rows.sample import ImagePart, Part, Sample, TextPart
from qwen3vl_train.data.rows.values import check_text, is_empty, is_number

UNITS = ("pixel", "unit", "per_mille")  # unit: 0 to 1; per_mille: 0 to 1000
LAYOUTS = ("xyxy", "xywh")
_PLACEHOLDER = re.compile(r"<(box|point)>")
_PLURAL = {"box": "boxes", "point": "points"}
_SWIFT_MARK = re.compile(r"<(ref-object|bbox)>")
_SWIFT_UNITS = {"real": "pixel", "norm1": "unit", "norm1000": "per_mille"}


class _BoxFault(RowFault):
    default_kind = "invalid_boxes"


class Convention(NamedTuple):
    """How boxes are given. unit: one of UNITS, or None: not stated. layout: one of LAYOUTS."""

    unit: str | None = None
    layout: str = "xyxy"


NO_CONVENTION = Convention()


def fill_boxes(sample: Sample, row: Mapping[str, Any], columns: Columns, default: Convention) -> Sample:
    """Replace the placeholders of a sample by the boxes and points of its row.

    columns: other names for the columns `boxes` and `points`.
    default: the convention of the data set; the row's own `bbox` and `bbox_layout` take precedence.
    Where neither states a unit and there are no boxes, placeholders are plain text. Raise RowFault when placeholders
    and boxes differ in number, or a box is malformed, has no area, or lies outside its image by more than 0.5/1000.
    """
    columns_of = listed_marks(row, columns)
    found = _find(sample, _PLACEHOLDER)
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
                + _unread_bbox(row, columns)
                * (not entries)
            )
        texts[kind] = iter(
            [_format(entry, kind, f"{plural}[{index}]", convention, size_of) for index, entry in enumerate(entries)]
        )

    return _substitute(sample, _PLACEHOLDER, texts) if found else sample


def fill_objects(sample: Sample, row: Mapping[str, Any]) -> Sample:
    """Replace ms-swift's `<ref-object>` and `<bbox>` by the texts and boxes of the row's `objects`.

    bbox_type: "real" pixels (the default), "norm1" 0 to 1, "norm1000" 0 to 1000. A bbox of two numbers is a point.
    image_id: for each bbox, the image that it is on, counted from 0.
    Objects without any mark in the texts are metadata. Raise RowFault where marks and objects differ in number.
    """
    objects, marks = row.get("objects"), _find(sample, _SWIFT_MARK)
    if not marks:
        return sample if is_empty(objects) else replace(sample, ignored=(*sample.ignored, "row.objects"))
    if not isinstance(objects, dict):
        fault = f"<{marks[0]}> in the text but no objects in the row; write objects: {{ref: [...], bbox: [...]}}"
        raise _BoxFault(fault)
    unit = _SWIFT_UNITS.get(objects.get("bbox_type") or "real")
    if unit is None:
        raise _BoxFault(f"objects.bbox_type is {str(objects['bbox_type'])[:50]!r}; use {', '.join(_SWIFT_UNITS)}")
    refs, boxes, images = (objects.get(key) or [] for key in ("ref", "bbox", "image_id"))
    for name, key, values in (("ref-object", "ref", refs), ("bbox", "bbox", boxes)):
        if not isinstance(values, list) or len(values) != (wanted := marks.count(name)):
            got = len(values) if isinstance(values, list) else "no list of"
            raise _BoxFault(f"objects.{key} has {got} entries for {wanted} <{name}> in the text; write one for each")
    if not isinstance(images, list) or (images and len(images) != len(boxes)):
        raise _BoxFault("objects.image_id is not a list of one image for each bbox; write one for each")
    size_of, convention = _image_sizes(sample), Convention(unit)
    texts = {"ref-object": iter([check_text(ref, f"objects.ref[{index}]") for index, ref in enumerate(refs)])}
    shown = []
    for index, box in enumerate(boxes):
        kind = "point" if isinstance(box, list | tuple) and len(box) == 2 else "box"
        entry = {kind: box, "image": images[index]} if images else box
        shown.append(_format(entry, kind, f"objects.bbox[{index}]", convention, size_of))
    return _substitute(sample, _SWIFT_MARK, {**texts, "bbox": iter(shown)})


def _find(sample: Sample, pattern: re.Pattern[str]) -> list[str]:
    return [match for part in sample.parts if isinstance(part, TextPart) for match in pattern.findall(part.text)]


def _substitute(sample: Sample, pattern: re.Pattern[str], texts: Mapping[str, Iterator[str]]) -> Sample:
    """Replace every match of a pattern by the next text of its first group."""

    def fill(part: Part) -> Part:
        if not isinstance(part, TextPart):
            return part
        return TextPart(pattern.sub(lambda match: next(texts[match[1]]), part.text))

    messages = [replace(message, content=tuple(map(fill, message.content))) for message in sample.messages]
    return replace(sample, messages=tuple(messages))


def listed_marks(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return what a row lists as boxes and as points, under "box" and "point"; None where there is no such column."""
    return {kind: _column(row.get(column_names(plural, columns)[0]), kind) for kind, plural in _PLURAL.items()}


def _column(values: Any, kind: str) -> Any:
    """Return a column of boxes or points. A flat list of numbers is the only one of its row."""
    flat = isinstance(values, list) and len(values) == (4 if kind == "box" else 2) and all(map(is_number, values))
    return [values] if flat else values


def _unread_bbox(row: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    named = "boxes" in columns or not isinstance(row.get("bbox"), list)
    return "" if named else ", or name their column: columns: {boxes: bbox}"


def _row_setting(row: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str | None:
    value = row.get(key)
    if not isinstance(value, str):  # a column of numbers that has the name by chance is data, or metadata
        return None
    if value not in known:
        raise _BoxFault(f"{key} is {value[:50]!r}; use {', '.join(known)}, and list boxes under boxes")
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
                height, width = image_size(images[index].image, sample.media_root, ANY_SIZE)
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
