import os

import numpy as np
import pytest
from PIL import Image

from qwen3vl_train.data.rows.media_files import local_files, read_stats, row_stamps, stamp_of
from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, TextPart, VideoPart
from tests.helpers import faults


def sample(*parts, root=None):
    return Sample((Message("user", parts), Message("assistant", (TextPart("a.png"),), 1.0)), media_root=root)


def test_only_media_that_are_files_of_their_own_are_looked_at(tmp_path):
    clip = VideoPart(("f0.png", b"bytes", "f1.png"), fps=2.0)
    found = local_files(
        sample(
            ImagePart("a.png"), ImagePart(b"bytes"), ImagePart("data:image/png;base64,AA=="), TextPart("t"), clip,
            ImagePart(Image.new("RGB", (2, 2))), VideoPart("/v.mp4"), root=str(tmp_path),
        )
    )  # fmt: skip
    assert found == [f"{tmp_path}/a.png", f"{tmp_path}/f0.png", f"{tmp_path}/f1.png", "/v.mp4"]
    assert local_files(sample(ImagePart("a.png"))) == ["a.png"]


@pytest.mark.parametrize("late", [0.0, 1.0], ids=["a slow file system", "a quick one"])
def test_stats_of_many_files_come_in_their_order(tmp_path, late):
    faults.call_disk_slow_after(late)
    paths = []
    for number in range(2500):
        paths.append(str(tmp_path / f"{number}"))
        if number % 7:
            (tmp_path / f"{number}").write_bytes(b"x" * (number % 13))
    stats = read_stats(paths)
    assert stats.shape == (2500, 2)
    for number, (size, time) in enumerate(stats.tolist()):
        assert size == (number % 13 if number % 7 else -1)
        assert time == (os.stat(paths[number]).st_mtime_ns if number % 7 else -1)
    assert read_stats([]).shape == (0, 2)
    assert read_stats(["a\0b"]).tolist() == [[-1, -1]]


def test_a_stamp_changes_with_size_and_time_of_any_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, ns=(5, 5))
    row = sample(ImagePart("a"), ImagePart("b"), root=str(tmp_path))
    seen = {stamp_of(row)}
    os.utime(tmp_path / "b", ns=(5, 6))
    seen.add(stamp_of(row))
    (tmp_path / "b").write_bytes(b"123")
    os.utime(tmp_path / "b", ns=(5, 6))
    seen.add(stamp_of(row))
    (tmp_path / "a").unlink()
    seen.add(stamp_of(row))
    assert len(seen) == 4
    assert stamp_of(sample(TextPart("t"))) == 0


def test_stamps_of_rows_are_those_of_their_samples(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    rows = [sample(*(ImagePart(name) for name in names), root=str(tmp_path)) for names in ("ab", "", "c", "a")]
    paths = [path for row in rows for path in local_files(row)]
    stamps = row_stamps(np.array([2, 0, 1, 1]), read_stats(paths))
    assert stamps.tolist() == [stamp_of(row) for row in rows]
