"""Boxes and points are found in text, their convention is judged, and they are drawn on their image or not at all."""

import json
import time

import pytest

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.sources import open_sources
from qwen3vl_train.inspect.boxes import Box, BoxEvidence, Point, box_evidence, find_boxes, find_marks, find_points
from qwen3vl_train.inspect.training import Entry, IndexedFile, RowRef
from tests.helpers.small_runs import picture, write_rows


def test_finds_lists_corners_and_labels():
    text = (
        'a [1, 2, 3, 4] b (5,6),(7, 8) c {"bbox_2d": [0.5, 1.25, 3, 4], "label": "red cup"} d [1, 2, 3] e [1,2,3,4,5]'
    )
    assert find_boxes(text) == [Box(1, 2, 3, 4), Box(5, 6, 7, 8), Box(0.5, 1.25, 3, 4, "red cup")]


def test_finds_points_by_their_key():
    text = '[1, 2] {"point_2d": [10, 20.5], "label": "tip"} {"point": [3,4]} {"count": [5, 6]} {"point_2d": [1, 2, 3]}'
    assert find_points(text) == [Point(10, 20.5, "tip"), Point(3, 4)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[100, 200, 900, 1000]", None),
        ("[0, 0, 1, 1]", None),  # a corner in thousandths, or the whole image in fractions: both possible
        ("[0, 0, 10, 10] [100, 200, 1100, 900]", "boxes_pixel"),
        ("[-5, 0, 10, 10]", "boxes_pixel"),
        ("[0.1, 0.2, 0.5, 0.9]", "boxes_unit"),
        ("[600, 700, 90, 80]", "boxes_xywh"),
    ],
)
def test_numbers_that_are_not_thousandths(text, fault):
    assert box_evidence(find_boxes(text), None) == BoxEvidence(fault)


def evidence(text, width, height):
    return box_evidence(find_boxes(text), (height, width))


def test_boxes_that_fit_a_small_image_in_pixels():
    assert evidence("[10, 20, 190, 90]", 200, 100).in_pixels is True
    assert evidence("[10, 20, 190, 90] [10, 20, 190, 700]", 200, 100).in_pixels is False
    assert evidence("[10, 20, 790, 590]", 800, 600).in_pixels is True
    assert evidence("[10, 20, 790, 590]", 801, 600).in_pixels is None  # most boxes in thousandths would fit it, too


def test_furthest_end_of_boxes_of_a_large_image():
    # 500 thousandths of 2000 pixels may have been anything from 999 pixels on.
    assert evidence("[0, 0, 500, 900]", 2000, 1000) == BoxEvidence(None, furthest=999.0)
    assert evidence("[0, 0, 500, 900] [0, 0, 600, 100]", 2000, 1000).furthest == 1199.0
    assert evidence("[0, 0, 500, 900]", 1200, 1600).furthest == pytest.approx(1439.2)
    assert evidence("[0, 0, 500, 900]", 1199, 1199) == BoxEvidence(None)
    assert evidence("[600, 700, 90, 80]", 2000, 1000) == BoxEvidence("boxes_xywh")


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "[1," * 50_000, "[1, 2, 3, " * 20_000, "9" * 200_000, "(1,1)," * 50_000, '"point":' * 50_000]
)
def test_hostile_text_takes_linear_time(text):
    started = time.process_time()
    find_boxes(text)
    find_points(text)
    # Backtracking would take hours; the usual time is below 0.1 s, of this process alone whatever else runs.
    assert time.process_time() - started < 20


@pytest.fixture
def marks_of(tmp_path):
    """Return a function: one row of a file, and settings of its entry -> its marks as (values, label, medium)."""
    picture(200, 100, 0).save(tmp_path / "a.png")
    picture(400, 50, 1).save(tmp_path / "b.png")

    def find(row, listed=True, **settings):
        (source,) = open_sources(TrainSource(path=str(write_rows(tmp_path / "rows.jsonl", [row])), **settings))
        entry = Entry(0, "rows", "train", 1.0, [IndexedFile(source, None, 0, [])])
        ref = RowRef(0, 0, 0)
        return [tuple(mark) for mark in find_marks(entry.sample(ref), entry.listed_marks(ref) if listed else None)]

    return find


def question(answer, images, **more):
    return {"question": "<image>" * len(images) + "Where?", "answer": answer, "image": images, **more}


def test_marks_of_several_images_follow_their_entries(marks_of):
    answer = '[{"bbox_2d": <box>, "label": "cup"}, {"bbox_2d": <box>}] The tip is at <point>, the end at <point>.'
    row = question(
        answer,
        ["a.png", "b.png"],
        boxes=[{"box": [100, 10, 200, 20], "image": 1}, {"box": [100, 10, 200, 20], "image": 0}],
        points=[{"point": [20, 10], "image": 0}, {"point": [40, 50], "image": 1}],
        bbox="pixel",
    )
    assert marks_of(row) == [
        ((250, 200, 500, 400), "cup", 1),
        ((500, 100, 1000, 200), "", 0),
        ((100, 100), "", 0),
        ((100, 1000), "", 1),
    ]


def test_marks_of_one_image_need_not_name_it(marks_of):
    row = question("at <box>", ["a.png"], boxes=[[0.1, 0.2, 0.3, 0.4]])
    assert marks_of(row, bbox="unit") == [((100, 200, 300, 400), "", 0)]
    two = question("at <box>", ["a.png", "b.png"], boxes=[[0.1, 0.2, 0.3, 0.4]])
    assert marks_of(two, bbox="unit") == [((100, 200, 300, 400), "", None)]
    wrong = question("at <box>", ["a.png", "b.png"], boxes=[{"box": [0.1, 0.2, 0.3, 0.4], "image": 7}])
    assert marks_of(wrong, bbox="unit") == [((100, 200, 300, 400), "", None)]


def test_marks_of_other_columns_and_of_the_text(marks_of):
    row = question("like [1, 2, 3, 4]: <box> and <point>", ["a.png"], rects=[[0, 0, 50, 50]], points=[[7, 9]])
    assert marks_of(row, bbox="per_mille", columns={"boxes": "rects"}) == [
        ((0, 0, 50, 50), "", 0),
        ((7, 9), "", 0),
        ((1, 2, 3, 4), "", 0),
    ]


def test_marks_in_text_belong_to_the_only_image(marks_of):
    answer = '{"bbox_2d": [1, 2, 3, 4], "label": "cup"} {"point_2d": [5, 6]} [7, 8]'
    expected = [((1, 2, 3, 4), "cup", 0), ((5, 6), "", 0)]
    assert marks_of(question(answer, ["a.png"])) == expected
    assert [mark[2] for mark in marks_of(question(answer, ["a.png", "b.png"]))] == [None, None]
    assert marks_of(question("at [10, 20, 3000, 40]", ["a.png"])) == [((10, 20, 3000, 40), "", None)]


def test_marks_of_streamed_rows_come_from_their_text(marks_of):
    row = question(json.dumps([{"bbox_2d": "BOX"}]).replace('"BOX"', "<box>"), ["a.png"], boxes=[[0, 0, 50, 50]])
    assert marks_of(row, listed=False, bbox="per_mille") == [((0, 0, 50, 50), "", 0)]


def test_placeholder_that_stays_text_is_not_a_mark(marks_of):
    assert marks_of(question("what is <box>? [1, 2, 3, 4]", ["a.png"])) == [((1, 2, 3, 4), "", 0)]
