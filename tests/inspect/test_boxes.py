"""Boxes are found in text, and their convention told from their numbers."""

import time

import pytest

from qwen3vl_train.inspect.boxes import Box, convention_fault, find_boxes


def test_finds_lists_corners_and_labels():
    text = (
        'a [1, 2, 3, 4] b (5,6),(7, 8) c {"bbox_2d": [0.5, 1.25, 3, 4], "label": "red cup"} d [1, 2, 3] e [1,2,3,4,5]'
    )
    assert find_boxes(text) == [Box(1, 2, 3, 4), Box(5, 6, 7, 8), Box(0.5, 1.25, 3, 4, "red cup")]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("no box at all", None),
        ("[100, 200, 900, 1000]", None),
        ("[0, 0, 1, 1]", None),  # the corner of a picture in thousandths, or all of it as fractions: cannot be told
        ("[0, 0, 10, 10] [100, 200, 1100, 900]", "boxes_pixel"),
        ("[-5, 0, 10, 10]", "boxes_pixel"),
        ("[0.1, 0.2, 0.5, 0.9]", "boxes_unit"),
        ("[600, 700, 90, 80]", "boxes_xywh"),
    ],
)
def test_convention(text, kind):
    assert convention_fault(find_boxes(text)) == kind


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "[1," * 50_000, "[1, 2, 3, " * 20_000, "9" * 200_000, "(1,1)," * 50_000]
)
def test_hostile_text_takes_no_longer_than_its_length(text):
    started = time.perf_counter()
    find_boxes(text)
    assert time.perf_counter() - started < 2  # backtracking would take hours; the usual time is below 0.1 s
