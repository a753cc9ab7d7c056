"""Every type of file gives its rows by index and as a stream, from any row on."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry as registry

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.image import load_rgb
from qwen3vl_train.data.media.remote import Remote
from qwen3vl_train.data.packing.index import LengthRule, build_index
from qwen3vl_train.data.rows.parse import format_counts
from qwen3vl_train.data.sources import JsonlSource, open_sources, open_stream
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.row_files import KINDS, NUM_ROWS, ROW, png, talks, texts, write_all, write_tar


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_index(files, kind):
    (source,) = open_sources(TrainSource(path=str(files[kind])))
    assert len(source) == NUM_ROWS
    source = pickle.loads(pickle.dumps(source))
    for row in (8, 0, 3, 4):
        sample = source.sample(row)
        assert (sample.sample_id, source.row_number(row)) == (f"{kind}:{row + 1}", row + 1)
        image = sample.messages[0].content[0].image
        assert (Path(sample.media_root or "", image).read_bytes() if isinstance(image, str) else image) == png(row)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_continues_after_any_row(files, kind):
    entry = TrainSource(path=str(files[kind]))
    rows = list(open_stream(entry).rows())
    assert [texts(row.sample)[0] for row in rows] == [f"Nr {n}?" for n in range(NUM_ROWS)]
    assert [row.row_number for row in rows] == list(range(1, NUM_ROWS + 1))
    (source,) = open_sources(entry)
    assert [row.sample for row in rows] == [source.sample(n) for n in range(NUM_ROWS)]
    numbered = [(row.row_number, row.sample) for row in rows]
    for row in rows:
        state = json.loads(json.dumps(row.state))
        rest = pickle.loads(pickle.dumps(open_stream(entry))).rows(state)
        assert [(row.row_number, row.sample) for row in rest] == numbered[row.row_number :]


def test_fingerprint_depends_on_content_not_on_path(files, tmp_path):
    for kind in KINDS[:-1]:
        copy = tmp_path / kind
        copy.write_bytes(files[kind].read_bytes())
        source, same = (open_sources(TrainSource(path=str(file)))[0] for file in (files[kind], copy))
        assert same.fingerprint() == source.fingerprint()
        assert json.loads(json.dumps(same.fingerprint())) == same.fingerprint()
    (tmp_path / "a.jsonl").write_text(ROW % "a")
    (tmp_path / "c.jsonl").write_text(ROW % "c")
    one, other = (JsonlSource(tmp_path / f"{name}.jsonl").fingerprint() for name in "ac")
    assert one != other
    assert one["size"] == other["size"]


def test_patterns_and_folders_give_one_source_per_file(tmp_path):
    for name in ("b-2.jsonl", "b-1.jsonl", "c.json", "notes.txt"):
        (tmp_path / name).write_text(ROW % name)
    sources = open_sources(TrainSource(path=f"{tmp_path}/b-*.jsonl", name="mine"))
    assert [source.name for source in sources] == [f"{tmp_path}/b-1.jsonl", f"{tmp_path}/b-2.jsonl"]
    assert sources[1].sample(0).sample_id == "mine:b-2.jsonl:1"
    assert open_sources(TrainSource(path=f"{tmp_path}/b-*.jsonl"))[0].sample(0).sample_id == "b-*.jsonl:b-1.jsonl:1"
    stream = open_stream(TrainSource(path=str(tmp_path)))
    rows = list(stream.rows())
    assert [Path(row.file).name for row in rows] == ["b-1.jsonl", "b-2.jsonl", "c.json"]
    assert [row.file for row in stream.rows(rows[0].state)] == [row.file for row in rows[1:]]
    assert message_of(ValueError, open_sources, TrainSource(path=f"{tmp_path}/d-*")) == (
        f"{tmp_path}/d-*: no file in it ends with .jsonl, .json, .parquet, .tar, .csv, .tsv; check the paths under data"
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
def test_media_are_in_the_folder_of_each_file(tmp_path, kind):
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_all(tmp_path / name)
        (tmp_path / name / "2.png").write_bytes(png(100 + number))
        table = pa.table({"question": ["?"] * 3, "answer": ["x"] * 3, "image": [f"{n}.png" for n in range(3)]})
        pq.write_table(table, tmp_path / name / "a.parquet")
    entry = TrainSource(path=f"{tmp_path}/*/{kind}")
    sources = open_sources(entry)
    samples = [source.sample(row) for source in sources for row in range(len(source))]
    assert [row.sample for row in open_stream(entry).rows()] == samples
    if not kind.endswith((".tar", ".tar.gz")):  # the media of a shard are in it
        red = [int(load_rgb(sample.messages[0].content[0].image, sample.media_root)[0, 0, 0]) for sample in samples]
        assert [value for value in red if value >= 100] == [100, 101]
    elsewhere = TrainSource(path=f"{tmp_path}/*/{kind}", media_root=str(tmp_path / "b"))
    samples = [source.sample(0) for source in open_sources(elsewhere)]
    assert [row.sample for row in open_stream(elsewhere).rows() if row.row_number == 1] == samples
    roots = {sample.media_root for sample in samples}
    assert roots == ({None} if kind.endswith((".tar", ".tar.gz")) else {str(tmp_path / "b")})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
def test_files_and_media_at_fsspec_urls(files, kind, bucket):
    for path in files.values():
        if path.is_file():
            bucket.pipe(f"/bucket/x/{path.name}", path.read_bytes())
    for number in range(NUM_ROWS):
        bucket.pipe(f"/bucket/x/{number}.png", png(number))
    (source,) = open_sources(TrainSource(path=f"memory://bucket/x/{kind}"))
    image = source.sample(5).messages[0].content[0].image
    assert texts(source.sample(5)) == ["Nr 5?", "ü" * 5 + "."]
    assert (image if isinstance(image, bytes) else image.fetch()) == png(5)
    rows = list(open_stream(TrainSource(path=f"memory://bucket/x/{kind}")).rows())
    assert [row.sample for row in rows] == [source.sample(n) for n in range(NUM_ROWS)]
    found = open_sources(TrainSource(path=f"memory://bucket/*/{kind}"))
    assert [source.name for source in found] == [f"memory:///bucket/x/{kind}"]


def test_media_outside_a_remote_root_are_refused(bucket):
    bucket.pipe("/bucket/x/a.jsonl", "\n".join(
        json.dumps({"image": path, "question": "?", "answer": "x"}) for path in ("../b.png", "/b.png", "s3://b/c.png")
    ).encode())  # fmt: skip
    for row in open_stream(TrainSource(path="memory://bucket/x/a.jsonl")).rows():
        assert isinstance(row.sample, MediaFault)
        assert "is outside media_root memory://bucket/x; give a path below it" in str(row.sample)


def test_hub_source_reads_a_split_and_keeps_images_encoded(files, tmp_path):
    os.symlink(files["a.parquet"], tmp_path / "train-0.parquet")
    entry = TrainSource(path=str(tmp_path), split="train")
    (source,) = open_sources(entry)
    assert source.sample(2).messages[0].content[0].image == png(2)
    assert [row.sample for row in open_stream(entry).rows()] == [source.sample(n) for n in range(NUM_ROWS)]
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"x": 1}])}).save_to_disk(str(tmp_path / "dict"))
    for split, fault in (
        (None, f"{tmp_path}/dict: no split None among test; set split to one of them"),
        ("test", f"{tmp_path}/dict: has the columns x, and none that rows are made from; name them under columns"),
    ):
        assert message_of(ValueError, open_sources, TrainSource(path=str(tmp_path / "dict"), split=split)) == fault
    fault = r"^no/such: |^no/such \(no folder here, so a name on the Hugging Face hub\): "
    with pytest.raises(ValueError, match=fault):
        open_sources(TrainSource(path="no/such", split="train"))


class Hub(type(fsspec.filesystem("memory"))):
    """The hub's file system, but in this process."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("hf://", "memory://"))


def test_images_on_the_hub_are_fetched_from_there(tmp_path, bucket, monkeypatch):
    monkeypatch.setitem(registry, "hf", Hub)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr("b.png", png(2))
    bucket.pipe({"/bucket/me@main/a.png": png(1), "/bucket/me@main/b.zip": out.getvalue()})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "c.png").write_bytes(png(3))
    paths = [
        "hf://bucket/me@main/a.png", "zip://b.png::hf://bucket/me@main/b.zip", "c.png", "https://nobody.invalid/d.png",
        "file:///etc/passwd::hf://bucket/me@main/a.png", "s3://bucket/a.png", "hf://bucket/none.png",
    ]  # fmt: skip
    rows = [{"question": "?", "answer": "x", "image": {"bytes": None, "path": path}} for path in paths]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "train-0.parquet")
    entry = TrainSource(path=str(tmp_path / "rows"), split="train")
    (source,) = open_sources(entry)
    samples = [source.sample(row) for row in range(len(rows))]
    assert [row.sample for row in open_stream(entry).rows()] == samples
    images = [(sample.messages[0].content[0].image, sample.media_root) for sample in samples]
    assert [int(load_rgb(*image)[0, 0, 0]) for image in images[:3]] == [1, 2, 3]
    for image, fault in zip(images[3:], (
        "image https://nobody.invalid/d.png: is a https URL and nothing is downloaded; give a local path or set "
        "allow_urls: true",
        "image file:///etc/passwd::hf://bucket/me@main/a.png: is a file URL and nothing is downloaded; give a local ",
        "image s3://bucket/a.png: is a s3 URL and nothing is downloaded; give a local path",
        "hf://bucket/none.png: cannot be read (",
    ), strict=True):  # fmt: skip
        assert message_of(MediaFault, load_rgb, *image).startswith(fault)
    allowed = TrainSource(path=str(tmp_path / "rows"), split="train", allow_urls=True)
    assert open_sources(allowed)[0].sample(3).messages[0].content[0].image == Remote(paths[3])
    elsewhere = TrainSource(path=str(tmp_path / "rows"), split="train", media_root="memory://bucket")
    found = [open_sources(elsewhere)[0].sample(row).messages[0].content[0].image for row in (0, 2)]
    assert found == [Remote(paths[0]), Remote("memory://bucket/c.png")]
    # A row of a plain file may say what it likes.
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "?", "answer": "x", "image": paths[0]}))
    (plain,) = open_sources(TrainSource(path=str(tmp_path / "a.jsonl")))
    with pytest.raises(MediaFault, match=r"is a hf URL and nothing is downloaded"):
        load_rgb(plain.sample(0).messages[0].content[0].image, str(tmp_path))


def test_blank_lines_are_skipped(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [ROW % text for text in ("ä", "b", "c\\r")]
    file.write_bytes(("\ufeff" + rows[0] + "\r\n\n  \n" + rows[1] + "\n" + rows[2]).encode())
    source = JsonlSource(file, tmp_path)
    assert len(source) == 3
    assert [source.raw(row).row for row in (2, 0, 1)] == [json.loads(rows[row]) for row in (2, 0, 1)]
    assert [source.row_number(row) for row in range(3)] == [1, 4, 5]
    assert (source.sample(1).sample_id, source.sample(1).media_root) == ("train.jsonl:4", str(tmp_path))
    streamed = list(open_stream(TrainSource(path=str(file))).rows())
    assert [row.sample for row in streamed] == [source.sample(row) for row in range(3)]
    assert [row.row_number for row in streamed] == [1, 4, 5]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_size_does_not_change_rows(tmp_path, block):
    faults.set_row_limits(block=block)
    rows = [{"question": f'ü {n} " ] \\ }}', "answer": "€" * n + "x"} for n in range(5)]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        source = JsonlSource(tmp_path / name)
        assert [source.raw(row).row for row in range(len(source))] == rows
        stream = list(open_stream(TrainSource(path=str(tmp_path / name))).rows())
        rest = list(open_stream(TrainSource(path=str(tmp_path / name))).rows(stream[1].state))
        assert [texts(row.sample) for row in rest] == [[row["question"], row["answer"]] for row in rows[2:]]


def test_array_is_detected_by_its_first_character(tmp_path):
    (tmp_path / "a.json").write_text(ROW % "a" + "\n" + ROW % "b")
    assert len(JsonlSource(tmp_path / "a.json")) == 2
    for text in ("", "[]", " [ ] "):
        (tmp_path / "a.json").write_text(text)
        assert len(JsonlSource(tmp_path / "a.json")) == 0


def test_unknown_parquet_columns_are_not_read(tmp_path):
    pq.write_table(pa.table({"q": ["?"], "a": ["x"], "junk": [b"1"]}), tmp_path / "a.parquet")
    entry = TrainSource(path=str(tmp_path / "a.parquet"), columns={"question": "q", "answer": "a"})
    (source,) = open_sources(entry)
    assert source.raw(0).row == {"q": "?", "a": "x"}
    assert source.ignored_columns == ("junk",)
    stream = open_stream(entry)
    assert stream.ignored_columns == ()
    assert [texts(row.sample) for row in stream.rows()] == [["?", "x"]]
    assert stream.ignored_columns == ("junk",)
    assert message_of(ValueError, open_sources, TrainSource(path=str(tmp_path / "a.parquet"))) == (
        f"{tmp_path}/a.parquet: has the columns q, a, junk, and none that rows are made from; name them under columns"
    )


def test_rows_that_are_lists_of_messages(tmp_path):
    """They reach the parser as they are; those of a shard together with its media."""
    row = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row), ROW % "a", json.dumps(row), "[1]"]))
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    for name, expected in (
        ("a.jsonl", [row, json.loads(ROW % "a"), row, [1]]),
        ("one.jsonl", [row]),
        ("a.json", [row] * 2),
    ):
        source = JsonlSource(tmp_path / name)
        assert [source.raw(number).row for number in range(len(source))] == expected
    write_tar(tmp_path / "a.tar", [("1.json", json.dumps(row).encode()), ("1.png", b"one"), ("2.json", b"[1]")])
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.tar")))
    assert source.raw(0).row == {"png": "1.png", "images": ["1.png"], "videos": [], "messages": row}
    assert source.raw(1).row == [1]


def test_rows_of_mixed_formats_in_one_file(tmp_path, collate):
    rows = [ROW % "a", json.dumps({"question": "?", "answer": "x"}), json.dumps(talks(1)[0]), "{}", "[1]", "7"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    streamed = list(open_stream(TrainSource(path=str(tmp_path / "a.jsonl"))).rows())
    assert [row.sample.row_format for row in streamed[:3]] == ["openai", "columns", "sharegpt"]
    assert [isinstance(row.sample, RowFault) for row in streamed] == [False] * 3 + [True] * 3
    for _ in range(2):  # the second time from what was kept of the first
        (tmp_path / "0.png").write_bytes(png(0))
        sources = open_sources(TrainSource(path=str(tmp_path / "a.jsonl")))
        index = build_index(sources, collate, LengthRule(500), cache_folder=tmp_path / "index")
        line = format_counts("a.jsonl", index.count_formats(0))
        assert line == "a.jsonl: 3 rows, openai 1, sharegpt 1, columns 1"
        assert len(index.rejects) == 3
