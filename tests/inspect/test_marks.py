"""Boxes and points are drawn on the picture that they belong to, or on none."""

import json

import pytest

from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.sources import open_sources
from qwen3vl_train.inspect.entries import Entry, IndexedFile, RowRef
from qwen3vl_train.inspect.marks import find_marks
from tests.helpers.small_runs import picture, write_rows


@pytest.fixture
def marks_of(tmp_path):
    """A function: one row of a file, and settings of its entry -> its marks as (values, label, medium)."""
    picture(200, 100, 0).save(tmp_path / "a.png")
    picture(400, 50, 1).save(tmp_path / "b.png")

    def find(row, listed=True, **settings):
        (source,) = open_sources(TrainSource(path=str(write_rows(tmp_path / "rows.jsonl", [row])), **settings))
        entry = Entry(0, "rows", "train", 1.0, [IndexedFile(source, None, 0, [])])
        ref = RowRef(0, 0, 0)
        return [tuple(mark) for mark in find_marks(entry.sample(ref), entry.listed(ref) if listed else None)]

    return find


def question(answer, images, **more):
    return {"question": "<image>" * len(images) + "Where?", "answer": answer, "image": images, **more}


def test_boxes_and_points_of_several_images_go_where_their_entries_say(marks_of):
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


def test_entries_of_one_image_need_not_name_it(marks_of):
    row = question("at <box>", ["a.png"], boxes=[[0.1, 0.2, 0.3, 0.4]])
    assert marks_of(row, bbox="unit") == [((100, 200, 300, 400), "", 0)]
    two = question("at <box>", ["a.png", "b.png"], boxes=[[0.1, 0.2, 0.3, 0.4]])
    assert marks_of(two, bbox="unit") == [((100, 200, 300, 400), "", None)]
    wrong = question("at <box>", ["a.png", "b.png"], boxes=[{"box": [0.1, 0.2, 0.3, 0.4], "image": 7}])
    assert marks_of(wrong, bbox="unit") == [((100, 200, 300, 400), "", None)]


def test_other_columns_and_numbers_written_by_hand_beside_them(marks_of):
    row = question("like [1, 2, 3, 4]: <box> and <point>", ["a.png"], rects=[[0, 0, 50, 50]], points=[[7, 9]])
    assert marks_of(row, bbox="per_mille", columns={"boxes": "rects"}) == [
        ((0, 0, 50, 50), "", 0),
        ((7, 9), "", 0),
        ((1, 2, 3, 4), "", 0),
    ]


def test_what_stands_in_text_is_drawn_on_the_only_picture(marks_of):
    answer = '{"bbox_2d": [1, 2, 3, 4], "label": "cup"} {"point_2d": [5, 6]} [7, 8]'
    expected = [((1, 2, 3, 4), "cup", 0), ((5, 6), "", 0)]
    assert marks_of(question(answer, ["a.png"])) == expected
    assert [mark[2] for mark in marks_of(question(answer, ["a.png", "b.png"]))] == [None, None]
    assert marks_of(question("at [10, 20, 3000, 40]", ["a.png"])) == [((10, 20, 3000, 40), "", None)]


def test_rows_of_a_stream_are_known_by_their_text_alone(marks_of):
    row = question(json.dumps([{"bbox_2d": "BOX"}]).replace('"BOX"', "<box>"), ["a.png"], boxes=[[0, 0, 50, 50]])
    assert marks_of(row, listed=False, bbox="per_mille") == [((0, 0, 50, 50), "", 0)]


def test_a_placeholder_that_stays_text_is_none(marks_of):
    assert marks_of(question("what is <box>? [1, 2, 3, 4]", ["a.png"])) == [((1, 2, 3, 4), "", 0)]
