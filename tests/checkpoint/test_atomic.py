"""A folder appears complete or not at all."""

import os
import shutil

import pytest

from qwen3vl_train.checkpoint.atomic import atomic_folder


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(FileNotFoundError), atomic_folder(out) as partial:
        shutil.copy(tmp_path / "missing", partial)
    assert list(out.parent.iterdir()) == []
    with atomic_folder(out) as partial:
        (partial / "file").write_text("complete")
        assert not out.exists()
    assert (out / "file").read_text() == "complete"
    assert os.listdir(out.parent) == ["out"]
    with (
        pytest.raises(ValueError, match=r"out: exists already; choose another folder or remove it$"),
        atomic_folder(out),
    ):
        pass
    assert (out / "file").read_text() == "complete"
