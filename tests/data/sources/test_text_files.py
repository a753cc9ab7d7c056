"""Arrays in any JSON file, and CSV and TSV files."""

import gzip
import json
import pickle

import pytest

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.sources import open_sources, open_stream
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.row_files import ROW, texts

OBJECT = {"question": "Ä?", "answer": "x"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read_both_ways(entry):
    """Return the row objects by index, after checking that the stream has the same rows, also from its middle."""
    (source,) = open_sources(entry)
    found = []
    for row in range(len(source)):
        try:
            found.append(source.raw(row).row)
        except RowFault as fault:
            found.append(str(fault))
    source = pickle.loads(pickle.dumps(source))
    streamed = list(open_stream(entry).rows())
    assert [row.row_number for row in streamed] == [source.row_number(row) for row in range(len(source))]
    for row, one in enumerate(streamed):
        expected = one.sample
        if isinstance(expected, RowFault):
            assert message_of(RowFault, source.sample, row) == str(expected)
        else:
            assert source.sample(row) == expected
    if streamed:
        middle = streamed[len(streamed) // 2]
        rest = list(open_stream(entry).rows(json.loads(json.dumps(middle.state))))
        assert [row.row_number for row in rest] == [row.row_number for row in streamed[len(streamed) // 2 + 1 :]]
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.json"])
@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps([OBJECT, OBJECT]),
        "\ufeff \n" + json.dumps([OBJECT, OBJECT], indent=1, ensure_ascii=False) + "\n",
        "[" + json.dumps(OBJECT) + ",\n" + json.dumps(OBJECT) + "]\n\n",
        json.dumps([OBJECT] * 2 + [TALK]),
    ],
)
def test_arrays_by_any_name(tmp_path, name, block, text):
    faults.set_row_limits(block=block)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = read_both_ways(TrainSource(path=str(tmp_path / name)))
    assert found == [OBJECT, OBJECT] + [TALK] * ("Hello" in text)


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        ([json.dumps(TALK)], [TALK]),
        ([json.dumps(TALK), ROW % "a", json.dumps(TALK)], [TALK, json.loads(ROW % "a"), TALK]),
        ([json.dumps([OBJECT, OBJECT]), json.dumps(OBJECT)], [[OBJECT, OBJECT], OBJECT]),
        (["[1]", json.dumps(OBJECT)], [[1], OBJECT]),
        (["[]", json.dumps(OBJECT)], [[], OBJECT]),
        (['["question": "?", "answer": "x"}', json.dumps(OBJECT)], ["not JSON (", OBJECT]),
        (['[{"a": 1} "b": 2]', json.dumps(OBJECT)], ["not JSON (", OBJECT]),
        (["[broken", json.dumps(OBJECT)], ["not JSON (", OBJECT]),
    ],
)
def test_lines_that_are_lists_are_rows(tmp_path, lines, rows):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_both_ways(TrainSource(path=str(tmp_path / "a.jsonl")))
    assert [row[:10] if isinstance(row, str) else row for row in found] == rows


def test_first_line_is_read_up_to_a_limit(tmp_path):
    """A file of one line would otherwise be read as a whole to find out that it is an array."""
    row = {"question": "?" * (1 << 20), "answer": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps([row] * 18))
    assert read_both_ways(TrainSource(path=str(tmp_path / "a.jsonl"))) == [row] * 18


TABLE = 'image,question,answer,note\r\na.png,What?,007,1\r\n\r\n,"two\nlines, ""quoted""",1.50,\r\nb.png,"Ä\u2028?",,2'


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "A.CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_text(tmp_path, name, mark):
    text = mark + (
        TABLE.replace("lines, ", "lines; ").replace(",", "\t").replace(";", ",") if ".tsv" in name else TABLE
    )
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    entry = TrainSource(path=str(tmp_path / name))
    assert read_both_ways(entry) == [
        {"image": "a.png", "question": "What?", "answer": "007"},
        {"image": None, "question": 'two\nlines, "quoted"', "answer": "1.50"},
        {"image": "b.png", "question": "Ä\u2028?", "answer": None},
    ]
    (source,) = open_sources(entry)
    stream = open_stream(entry)
    next(iter(stream.rows()))
    assert source.ignored_columns == stream.ignored_columns == ("note",)
    assert (source.sample(0).sample_id, source.sample(0).media_root) == (f"{name}:1", str(tmp_path))


def test_cells_of_lists_are_read_as_json(tmp_path):
    (tmp_path / "a.csv").write_text(
        'boxes,images,question,a\n"[[1, 2]]",a.png,[1],"{""a"": 1}"\n[x],"[""b.png""]",?,7\n'
    )
    entry = TrainSource(path=str(tmp_path / "a.csv"), columns={"answer": "a"})
    assert read_both_ways(entry) == [
        {"boxes": [[1, 2]], "images": "a.png", "question": "[1]", "a": '{"a": 1}'},
        {"boxes": "[x]", "images": ["b.png"], "question": "?", "a": "7"},
    ]


def test_broken_records_of_tables_are_faults_of_their_rows(tmp_path):
    lines = [b"question,answer", b"?,a", b"?,b,c", b'"?"x,d', b"\xff,e", b"?", b"?,f", b'?,"not closed', b"?,g"]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    a_comma = "put texts with a comma or a line break in double quotes"
    quotes = 'put texts in double quotes, and write "" for a double quote in them'
    assert read_both_ways(TrainSource(path=str(tmp_path / "a.csv"))) == [
        {"question": "?", "answer": "a"},
        f"3 cells for 2 columns; {a_comma}",
        f"not CSV (',' expected after '\"'); {quotes}",
        "not UTF-8 (byte 0 of the row); save the file as UTF-8",
        f"1 cells for 2 columns; {a_comma}",
        {"question": "?", "answer": "f"},
        f"not CSV (unexpected end of data); {quotes}",
    ]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.csv", b"a,b\n1,2", "has the columns a, b, and none that rows are made from; name them under columns"),
        ("a.csv", b"", "has the columns , and none that rows are made from; name them under columns"),
        ("a.csv", b"question;answer\n?;x", "its first line names one column, 'question;answer'; separate columns by "
         "commas in .csv, by tabs in .tsv"),
        ("a.tsv", b"question,answer\n?,x", "its first line names one column, 'question,answer'; separate columns by "
         "commas in .csv, by tabs in .tsv"),
        ("a.csv", b"answer,answer\n?,x", "two columns are called answer; rename one of them"),
        ("a.csv", "question,answer\n".encode("utf-16"), "not UTF-8; save the file as UTF-8"),
        ("a.csv", b'"question,answer', "its first line is not one of column names (unexpected end of data); write "
         "names"),
        ("a.csv.gz", b"question", "is truncated or damaged after row 0 (Not a gzipped file (b'qu')); copy the file "
         "again"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, name, text, fault):
    (tmp_path / name).write_bytes(text)
    entry = TrainSource(path=str(tmp_path / name))
    assert message_of(ValueError, open_sources, entry) == f"{tmp_path}/{name}: {fault}"
    assert message_of(ValueError, lambda: list(open_stream(entry).rows())) == f"{tmp_path}/{name}: {fault}"


def test_too_long_cell_is_a_fault_of_its_row(tmp_path):
    faults.set_row_limits(row=1 << 10)
    (tmp_path / "a.csv").write_text(f'question,answer\n?,a\n?,"{"x" * 2000}\n{"y" * 2000}"\n?,b\n')
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.csv")))
    assert [texts(source.sample(row))[1] for row in (0, 2)] == ["a", "b"]
    assert message_of(RowFault, source.sample, 1) == "row of 0 MiB is longer than 0 MiB; split it"


def test_pictures_in_cells_are_longer_than_the_limit_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text(f"image,question,answer\n{'x' * 500_000},?,a\n")
    (row,) = read_both_ways(TrainSource(path=str(tmp_path / "a.csv")))
    assert len(row["image"]) == 500_000


def test_tables_of_a_folder_are_read_where_there_are_no_other_files(tmp_path):
    (tmp_path / "labels.csv").write_text("question,answer\n?,x\n")
    assert [source.name for source in open_sources(TrainSource(path=str(tmp_path)))] == [f"{tmp_path}/labels.csv"]
    (tmp_path / "a.jsonl").write_text(ROW % "a")
    for path in (str(tmp_path), f"{tmp_path}/*"):
        assert [source.name for source in open_sources(TrainSource(path=path))] == [f"{tmp_path}/a.jsonl"]
        assert {row.file for row in open_stream(TrainSource(path=path)).rows()} == {f"{tmp_path}/a.jsonl"}
    assert len(open_sources(TrainSource(path=f"{tmp_path}/*.csv"))) == 1


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_tables_through_datasets_are_text_too(tmp_path, name):
    text = "question,answer\n?,007\nNA,None\n?,\n"
    (tmp_path / name).write_text(text if name == "train.csv" else text.replace(",", "\t"))
    entry = TrainSource(path=str(tmp_path), split="train")
    expected = [{"question": "?", "answer": "007"}, {"question": "NA", "answer": "None"}]
    (source,) = open_sources(entry)
    assert [source.raw(row).row for row in range(2)] == expected
    assert source.raw(2).row == {"question": "?", "answer": None}
    assert [texts(row.sample) for row in list(open_stream(entry).rows())[:2]] == [["?", "007"], ["NA", "None"]]


def test_cell_with_a_key_given_twice_is_a_fault(tmp_path):
    cell = '[{"role": "assistant", "content": "a", "content": "b"}]'.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n')
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.csv")))
    fault = "the key 'content' is in one object twice; keep one of them"
    assert message_of(RowFault, source.sample, 0) == fault
