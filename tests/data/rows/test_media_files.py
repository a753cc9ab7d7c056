import base64
import os

import numpy as np
import pytest
from PIL import Image

from qwen3vl_train.data.rows.media_files import local_files, media_signature
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, TextPart, VideoPart
from qwen3vl_train.data.signatures import hash_rows, read_signatures
from tests.helpers import faults


def sample(*parts, root=None):
    return Sample((Message("user", parts), Message("assistant", (TextPart("a.png"),), 1.0)), media_root=root)


def test_local_files_are_media_that_are_files(tmp_path):
    clip = VideoPart(("f0.png", b"bytes", "f1.png"), fps=2.0)
    found = local_files(
        sample(
            ImagePart("a.png"), ImagePart(b"bytes"), ImagePart("data:image/png;base64,AA=="), TextPart("t"), clip,
            ImagePart(Image.new("RGB", (2, 2))), VideoPart("/v.mp4"), root=str(tmp_path),
        )
    )  # fmt: skip
    assert found == [f"{tmp_path}/a.png", f"{tmp_path}/f0.png", f"{tmp_path}/f1.png", "/v.mp4"]
    assert local_files(sample(ImagePart("a.png"))) == ["a.png"]


def test_files_of_uris_and_folders_are_local_files(tmp_path):
    """A frame that is replaced in its folder changes the row's signature, as the picture of a URI does."""
    (tmp_path / "clip").mkdir()
    for name in ("10.png", "9.png", "notes.txt"):
        (tmp_path / "clip" / name).write_bytes(b"x")
    (tmp_path / "a b.png").write_bytes(b"x")
    text = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()
    media = (
        ImagePart((tmp_path / "a b.png").as_uri()), ImagePart(text), ImagePart("file://elsewhere/a.png"),
        VideoPart("clip", sample_fps=1.0),
    )  # fmt: skip
    row, at = sample(*media, root=str(tmp_path)), str(tmp_path)
    assert local_files(row) == [
        f"{at}/a b.png", f"{at}/file://elsewhere/a.png", f"{at}/clip", f"{at}/clip/9.png", f"{at}/clip/10.png",
    ]  # fmt: skip
    for name in ("a b.png", "clip/9.png"):
        before = media_signature(row)
        (tmp_path / name).write_bytes(b"another")
        assert media_signature(row) != before


@pytest.mark.parametrize("slow", [0.0, 1.0], ids=["a slow file system", "a quick one"])
def test_signatures_of_many_files_come_in_order(tmp_path, slow):
    faults.call_disk_slow_after(slow)
    paths = []
    for number in range(2500):
        paths.append(str(tmp_path / f"{number}"))
        if number % 7:
            (tmp_path / f"{number}").write_bytes(b"x" * (number % 13))
    signatures = read_signatures(paths)
    assert signatures.shape == (2500, 2)
    for number, (size, time) in enumerate(signatures.tolist()):
        assert size == (number % 13 if number % 7 else -1)
        assert time == (os.stat(paths[number]).st_mtime_ns if number % 7 else -1)
    assert read_signatures([]).shape == (0, 2)
    assert read_signatures(["a\0b"]).tolist() == [[-1, -1]]


def test_media_signature_changes_with_any_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, ns=(5, 5))
    row = sample(ImagePart("a"), ImagePart("b"), root=str(tmp_path))
    seen = {media_signature(row)}
    for content in (b"12", b"123"):
        (tmp_path / "b").write_bytes(content)
        os.utime(tmp_path / "b", ns=(5, 6))
        seen.add(media_signature(row))
    (tmp_path / "a").unlink()
    assert len({*seen, media_signature(row)}) == 4


def test_hashes_of_rows_are_the_signatures_of_their_samples(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    rows = [sample(*(ImagePart(name) for name in names), root=str(tmp_path)) for names in ("ab", "", "c", "a")]
    paths = [path for row in rows for path in local_files(row)]
    hashes = hash_rows(np.array([2, 0, 1, 1]), read_signatures(paths))
    assert hashes.tolist() == [media_signature(row) for row in rows]


def test_base64_text_is_not_asked_of_an_archive():
    text = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()
    row = {"question": "?", "answer": "x", "image": text}
    found = RowRules().sample(row, "row", None, resolve=lambda path: pytest.fail(path))
    assert found.messages[0].content[0] == ImagePart(text)
    assert RowRules().sample(row, "row", "s3://bucket/images").messages[0].content[0] == ImagePart(text)
