"""What the system refuses to write is named, and leaves no half of a line."""

import os
from pathlib import Path

import pytest

from qwen3vl_train.outputs import OutputError, append_text, check_writable, write_text, writing
from tests.helpers import faults
from tests.helpers.messages import message_of
from tests.helpers.small_runs import in_child

FULL = "cannot be written (No space left on device); make room or make it writable, then start again"


@pytest.mark.parametrize("write", [append_text, write_text])
def test_full_disk_names_the_file(write, tmp_path):
    file = tmp_path / "file"
    file.symlink_to("/dev/full")
    assert message_of(OutputError, write, file, "line\n") == f"{file}: {FULL}"


def test_line_that_does_not_fit_is_not_begun(tmp_path):
    file = tmp_path / "new" / "lines"
    append_text(file, "one \udc80\n")

    def fill() -> None:
        faults.fill_disk(file.stat().st_size + 3)
        assert message_of(OutputError, append_text, file, "three\n").startswith(f"{file}: cannot be written (File too")

    assert in_child(fill) == 0
    append_text(file, "two\n")
    assert file.read_text() == "one \\udc80\ntwo\n"


def test_check_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "new")
    (tmp_path / "kept").write_text("kept")
    check_writable(tmp_path / "kept")
    assert [(tmp_path / "kept").read_text(), os.listdir(tmp_path / "a")] == ["kept", []]
    fault = f"{tmp_path}/kept/below: cannot be written ("
    assert message_of(OutputError, check_writable, tmp_path / "kept" / "below").startswith(fault)


def test_error_of_a_file_that_is_read_passes(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out"):
        Path("/nowhere/weights").read_bytes()
