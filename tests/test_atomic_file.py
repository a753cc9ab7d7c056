"""Files appear complete or not at all, however many processes write them."""

import os
import shutil
from pathlib import Path

import pytest

from qwen3vl_train.atomic_file import atomic_file, is_temporary


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path):
    file = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError), atomic_file(file) as temporary:
        shutil.copy(tmp_path / "missing", temporary)
    assert list(tmp_path.iterdir()) == []
    with atomic_file(file, flushed=True) as temporary:
        temporary.write_text("complete")
        assert not file.exists()
        assert is_temporary(temporary.name)
    assert file.read_text() == "complete"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_two_writers_of_one_process_id_do_not_disturb_each_other(tmp_path: Path):
    """Containers on one disk often have the same process ids."""
    file = tmp_path / "a.npz"
    with atomic_file(file) as first:
        first.write_text("first")
        with atomic_file(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_what_a_kill_left_is_removed_a_day_later(tmp_path: Path):
    old, new, other = (tmp_path / name for name in (".a.npz.1.tmp", ".a.npz.2.tmp", ".b.npz.3.tmp"))
    for left in (old, new, other):
        left.write_text("half")
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    with atomic_file(tmp_path / "a.npz") as temporary:
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == [".a.npz.2.tmp", ".b.npz.3.tmp", "a.npz"]
