"""Tar shards: which files make a row, and which of them are its media."""

import json

import pytest

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.sources import open_sources, open_stream
from tests.helpers.messages import message_of
from tests.helpers.row_files import texts, write_tar


def test_shard_media_are_found_by_name_or_extension(tmp_path):
    talk = [{"role": "user", "content": [{"type": "image", "image": "jpg"}, {"type": "image", "image": "1.seg.png"}]},
            {"role": "assistant", "content": "ok"}]  # fmt: skip
    write_tar(tmp_path / "a.tar", [
        ("d/1.jpg", b"one"), ("d/1.seg.png", b"two"), ("d/1.json", json.dumps({"messages": talk}).encode()),
        ("d/2.json", json.dumps({"messages": talk}).encode()),
        ("d/3.txt", "ein Bär".encode()), ("d/3.jpg", b"three"),
        ("d/4.json", b"{"), ("d/5.jpg", b"x"), ("d/6.txt", b"\xff"),
    ])  # fmt: skip
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.tar"), columns={"answer": "txt"}))
    assert [part.image for part in source.sample(0).messages[0].content] == [b"one", b"two"]
    assert source.sample(2).messages[0].content[0].image == b"three"
    assert texts(source.sample(2)) == ["", "ein Bär"]
    for row, fault in (
        (1, "jpg: not among the files of its row in the shard (d/2.json); name one of them"),
        (3, "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); write one object "
            "a line"),
        (4, "no messages, no conversations and no txt among its keys (images, jpg, videos); write "
            '{"messages": [{"role": ..., "content": ...}, ...]} or name its columns under columns'),
        (5, "d/6.txt: not UTF-8 (byte 0); save it as UTF-8"),
    ):  # fmt: skip
        assert message_of(RowFault, source.sample, row) == fault


def test_shards_of_macos(tmp_path):
    """Its tar adds files of its own, in which extended attributes and the state of the Finder are kept."""
    row = json.dumps({"image": "1.jpg", "question": "?", "answer": "x"}).encode()
    write_tar(tmp_path / "a.tar", [
        (".DS_Store", b"x"), ("./._1.jpg", b"x"), ("./1.jpg", b"one"), ("__MACOSX/1.txt", b"x"), ("./._1.json", b"{"),
        ("./1.json", row), ("./PaxHeader/1.json", b"x"), ("PaxHeaders.17/2.json", b"x"), ("./2.jpg", b"two"),
        ("./2.json", row.replace(b"1.jpg", b"jpg")), ("d/.hidden", b"x"),
    ])  # fmt: skip
    entry = TrainSource(path=str(tmp_path / "a.tar"))
    (source,) = open_sources(entry)
    samples = [source.sample(row) for row in range(len(source))]
    assert [sample.messages[0].content[0].image for sample in samples] == [b"one", b"two"]
    streamed = list(open_stream(entry).rows())
    assert [row.sample for row in streamed] == samples
    assert [row.sample for row in open_stream(entry).rows(streamed[0].state)] == samples[1:]


def test_shard_media_by_the_path_that_they_once_had(tmp_path):
    def row(*images):
        return json.dumps({"images": images, "question": "<image>" * len(images) + "?", "answer": "x"}).encode()

    write_tar(tmp_path / "a.tar", [
        ("1.jpg", b"one"), ("1.json", row("coco/train2017/1.jpg")),
        ("2.jpg", b"two"), ("2.png", b"three"), ("2.json", row("C:\\a\\2.png", "https://a.b/2.jpg", "x/2.png")),
        ("3.jpg", b"four"), ("3.json", row("coco/train2017/000003.jpg")),
        ("4.jpg", b"five"), ("4.json", row("a/4.jpg", "b/4.jpg")),
    ])  # fmt: skip
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.tar")))
    assert source.sample(0).messages[0].content[0].image == b"one"
    for number, fault in (
        (1, "x/2.png: not among the files of its row in the shard (2.jpg, 2.png, 2.json); name one of them"),
        (2, "coco/train2017/000003.jpg: not among the files of its row in the shard (3.jpg, 3.json); name one of them"),
        (3, "b/4.jpg: not among the files of its row in the shard (4.jpg, 4.json); name one of them"),
    ):
        assert message_of(MediaFault, source.sample, number) == fault


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ("0.png 1.png 10.png 2.png", "0.png 1.png 2.png 10.png"),
        ("page_3.jpg page_1.png page_20.jpg", "page_1.png page_3.jpg page_20.jpg"),
        ("p1.10.png p1.9.png p0.11.png", "p0.11.png p1.9.png p1.10.png"),
        ("2.png left.png 1.png", "2.png left.png 1.png"),
        ("png jpg", "png jpg"),
    ],
)
def test_media_that_a_row_does_not_name_are_in_order(tmp_path, names, order):
    talk = json.dumps({"conversations": [{"from": "gpt", "value": "x"}]}).encode()
    members = [(f"7.{name}", b"x") for name in names.split()]
    write_tar(tmp_path / "a.tar", [*members, ("7.json", talk)])
    (source,) = open_sources(TrainSource(path=str(tmp_path / "a.tar")))
    assert source.raw(0).row["images"] == [f"7.{name}" for name in order.split()]
