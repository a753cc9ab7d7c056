import gzip
import json
import pickle

import pytest

from qwen3vl_train.data.faults import RowFault
from qwen3vl_train.data.sources import JsonlSource

ROW = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "ok"}]}'


def test_rows_are_lines_and_blank_ones_are_skipped(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [ROW % text for text in ("ä", "b", "c")]
    file.write_bytes(("\ufeff" + rows[0] + "\r\n\n  \n" + rows[1] + "\n" + rows[2]).encode())
    source = JsonlSource(file, tmp_path)
    assert len(source) == 3
    assert [source.raw(row).row for row in (2, 0, 1)] == [json.loads(rows[row]) for row in (2, 0, 1)]
    assert [source.row_number(row) for row in range(3)] == [1, 4, 5]
    sample = source.sample(1)
    assert (sample.sample_id, sample.media_root) == ("train.jsonl:4", str(tmp_path))
    assert sample.messages[0].text == "b"
    assert source.sample(0).messages[0].text == "ä"


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    assert len(JsonlSource(tmp_path / "a.jsonl")) == 0


def test_rows_that_are_not_utf8_are_faults_of_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes((ROW % "a").encode() + b'\n{"\xff": 1}\n')
    source = JsonlSource(file)
    assert source.sample(0).messages[0].text == "a"
    with pytest.raises(RowFault) as caught:
        source.sample(1)
    assert str(caught.value) == "not UTF-8 (byte 2 of the line); save the file as UTF-8"
    file.write_bytes(gzip.compress(b"x" * 100))
    with pytest.raises(RowFault, match=r"^not "):
        JsonlSource(file).sample(0)


def test_fingerprints_follow_the_content_not_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_text(ROW % "a")
    (tmp_path / "b.jsonl").write_text(ROW % "a")
    (tmp_path / "c.jsonl").write_text(ROW % "c")
    one, same, other = (JsonlSource(tmp_path / f"{name}.jsonl").fingerprint() for name in "abc")
    assert one == same
    assert one != other
    assert one["size"] == other["size"]


def test_sources_travel_to_workers(tmp_path):
    (tmp_path / "a.jsonl").write_text(ROW % "a")
    source = pickle.loads(pickle.dumps(JsonlSource(tmp_path / "a.jsonl")))
    assert source.sample(0).messages[0].text == "a"


def test_messages_about_paths(tmp_path):
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path / "none.jsonl")
    assert str(caught.value) == f"{tmp_path}/none.jsonl: no such file; check the paths under data"
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path)
    assert str(caught.value) == f"{tmp_path}: not a file; check the paths under data"
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError) as caught:
        JsonlSource(tmp_path / "a.jsonl", tmp_path / "pictures")
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl: media_root {tmp_path}/pictures is not a folder; check the paths under data"
    )
