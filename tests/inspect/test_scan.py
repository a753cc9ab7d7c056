"""What all rows of an entry show together: what nobody used, and questions that keep rows from sharing a beginning."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3vl_train.inspect.recipe import inspect_recipe
from tests.helpers.clip_files import write_clip
from tests.helpers.finding_rows import finding_rows_recipe
from tests.helpers.row_files import png
from tests.helpers.small_runs import picture, row, write_rows


@pytest.fixture
def source_of(tiny_folder, tmp_path):
    """Return a function: a data file and keys of its entry -> the facts of the source, and its findings by check."""

    def look(file, **entry):
        data = {"train": [{"path": str(file), **entry}], "num_workers": 0}
        steps = {"train": {"num_steps": 2, "packs_per_step": 1}} if entry.get("streaming") else {}
        facts = inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data, **steps), num_samples=0).facts
        return facts.sources[0], {finding.check: finding for finding in facts.findings}

    return look


@pytest.mark.parametrize("streaming", [False, True])
def test_ignored_columns_of_typed_files_are_counted(source_of, tmp_path, streaming):
    rows = [{"question": f"Nr {n}?", "answer": "Yes", "image": png(n), "width": 32, "source": "web"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source, _ = source_of(tmp_path / "a.parquet", streaming=streaming)
    assert source.ignored == {"row.width": 5, "row.source": 5}


def questions(*parts):
    return [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
        for content in parts
    ]


IMAGE, OTHER = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}


def text(words):
    return {"type": "text", "text": words}


def test_questions_before_a_shared_image_are_found(source_of, tmp_path):
    for name in "ab":
        picture(64, 64, ord(name)).save(tmp_path / f"{name}.png")
    first = [[text("How many?"), IMAGE], [text("Where?"), IMAGE], [IMAGE, text("When?")], [text("Who?"), OTHER]]
    _, findings = source_of(write_rows(tmp_path / "a.jsonl", questions(*first)))
    found = findings["question_first"]
    assert (found.level, found.rows, found.evidence) == (
        "warning",
        ["1", "2"],
        "2 of 4 rows (50%); rows 1 and 2 have the same first image",
    )


@pytest.mark.parametrize(
    "contents",
    [
        [[IMAGE, text("How many?")], [IMAGE, text("Where?")]],
        [[text("Picture 1: "), IMAGE, text("How many?")], [text("Picture 1: "), IMAGE, text("Where?")]],
        [[text("How many?"), IMAGE], [text("Where?"), OTHER]],
        [[text("How many?")], [text("Where?")]],
    ],
)
def test_rows_that_share_all_they_can_are_not_found(source_of, tmp_path, contents):
    for name in "ab":
        picture(64, 64, ord(name)).save(tmp_path / f"{name}.png")
    _, findings = source_of(write_rows(tmp_path / "a.jsonl", questions(*contents)))
    assert "question_first" not in findings


def test_equal_images_inside_of_rows_are_the_same(source_of, tmp_path):
    rows = [{"question": f"Nr {n}?<image>", "answer": "Yes", "image": png(7)} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert source_of(tmp_path / "a.parquet")[1]["question_first"].count == 3


def test_rejects_of_one_kind_are_one_group(source_of, tmp_path):
    lines = [row("a", "b")] + ["{"] * 3 + [{"messages": "none"}, json.dumps({"messages": 3}), "}"]
    source, _ = source_of(write_rows(tmp_path / "a.jsonl", lines))
    assert [(group.kind, group.count, group.rows) for group in source.rejects] == [
        ("invalid_json", 4, ["2", "3", "4", "7"]),
        ("wrong_type", 2, ["5", "6"]),
    ]


def test_clips_of_an_uneven_rate_are_noted(source_of, tmp_path):
    write_clip(tmp_path / "even.mp4", 24)
    write_clip(tmp_path / "uneven.gif", 24, codec="gif", pixel_format="rgb8")  # counts in hundredths of a second
    clips = [[{"type": "video", "video": name}] for name in ("even.mp4", "uneven.gif")]
    _, findings = source_of(write_rows(tmp_path / "a.jsonl", questions(*clips)))
    found = findings["uneven_clip"]
    assert (found.level, found.rows, found.evidence) == ("note", ["2"], "1 of 2 rows (50%)")


def test_ignored_keys_of_rows_turns_and_parts_are_counted(source_of, tmp_path):
    rows = [row(f"Nr {n}?", "Yes") | {"difficulty": n, "id": str(n)} for n in range(1, 4)]
    rows[0]["messages"][1]["recipient"] = "all"
    rows[1]["messages"][0]["content"][0]["index"] = 4
    source, _ = source_of(write_rows(tmp_path / "a.jsonl", rows))
    assert source.ignored == {"row.difficulty": 3, "row.id": 3, "turn.recipient": 1, "part.index": 1}


def test_marks_of_other_families_in_answers_are_found(source_of, tmp_path):
    rows = [row("Hi?", "[IMG] is it"), row("And?", "It is."), row("So?", "<start_of_image> and [IMG]")]
    _, findings = source_of(write_rows(tmp_path / "a.jsonl", rows))
    found = findings["foreign_mark"]
    assert (found.level, found.rows) == ("warning", ["1", "3"])
    assert found.evidence == "2 of 3 rows (66.7%); [IMG] 2, <start_of_image> 1"


def test_only_the_most_frequent_marks_are_named(source_of, tmp_path):
    rows = [row(f"Nr {n}?", f"<img>{n}.png</img>") for n in range(9)] + [row("Hi?", "[IMG]"), row("So?", "[IMG]")]
    _, findings = source_of(write_rows(tmp_path / "a.jsonl", rows))
    evidence = findings["foreign_mark"].evidence
    assert evidence.startswith("11 of 11 rows (100%); [IMG] 2, <img>0.png</img> 1, ")
    assert evidence.endswith(" and 5 others")
