"""Boxes and points are found in text, and the convention of boxes told from their numbers."""

import time

import pytest

from qwen3vl_train.inspect.boxes import Box, BoxEvidence, Point, box_evidence, find_boxes, find_points


def test_finds_lists_corners_and_labels():
    text = (
        'a [1, 2, 3, 4] b (5,6),(7, 8) c {"bbox_2d": [0.5, 1.25, 3, 4], "label": "red cup"} d [1, 2, 3] e [1,2,3,4,5]'
    )
    assert find_boxes(text) == [Box(1, 2, 3, 4), Box(5, 6, 7, 8), Box(0.5, 1.25, 3, 4, "red cup")]


def test_finds_points_by_their_key():
    text = '[1, 2] {"point_2d": [10, 20.5], "label": "tip"} {"point": [3,4]} {"count": [5, 6]} {"point_2d": [1, 2, 3]}'
    assert find_points(text) == [Point(10, 20.5, "tip"), Point(3, 4)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[100, 200, 900, 1000]", None),
        ("[0, 0, 1, 1]", None),  # the corner of a picture in thousandths, or all of it as fractions: cannot be told
        ("[0, 0, 10, 10] [100, 200, 1100, 900]", "boxes_pixel"),
        ("[-5, 0, 10, 10]", "boxes_pixel"),
        ("[0.1, 0.2, 0.5, 0.9]", "boxes_unit"),
        ("[600, 700, 90, 80]", "boxes_xywh"),
    ],
)
def test_numbers_that_are_no_thousandths(text, kind):
    assert box_evidence(find_boxes(text), None) == BoxEvidence(kind)


def evidence(text, width, height):
    return box_evidence(find_boxes(text), (height, width))


def test_boxes_that_fit_a_small_picture_in_pixels():
    assert evidence("[10, 20, 190, 90]", 200, 100).in_pixels is True
    assert evidence("[10, 20, 190, 90] [10, 20, 190, 700]", 200, 100).in_pixels is False
    assert evidence("[10, 20, 790, 590]", 800, 600).in_pixels is True
    assert evidence("[10, 20, 790, 590]", 801, 600).in_pixels is None  # most boxes in thousandths would fit it, too


def test_where_boxes_of_a_large_picture_end_in_pixels():
    # 500 thousandths of 2000 pixels may have been anything from 999 pixels on.
    assert evidence("[0, 0, 500, 900]", 2000, 1000) == BoxEvidence(None, furthest=999.0)
    assert evidence("[0, 0, 500, 900] [0, 0, 600, 100]", 2000, 1000).furthest == 1199.0
    assert evidence("[0, 0, 500, 900]", 1200, 1600).furthest == pytest.approx(1439.2)
    assert evidence("[0, 0, 500, 900]", 1199, 1199) == BoxEvidence(None)
    assert evidence("[600, 700, 90, 80]", 2000, 1000) == BoxEvidence("boxes_xywh")


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "[1," * 50_000, "[1, 2, 3, " * 20_000, "9" * 200_000, "(1,1)," * 50_000, '"point":' * 50_000]
)
def test_hostile_text_takes_no_longer_than_its_length(text):
    started = time.perf_counter()
    find_boxes(text)
    find_points(text)
    assert time.perf_counter() - started < 2  # backtracking would take hours; the usual time is below 0.1 s
