"""Folders of frames: their order, what is no frame, and the limits."""

import pytest
from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media import folders
from qwen3vl_train.data.media.folders import is_folder, list_frames
from tests.helpers.messages import message_of


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")


@pytest.mark.parametrize(
    "names",
    [
        ("2.png", "10.png", "100.png"),
        ("f-9.jpg", "f-010.jpg", "f-10.jpg", "f-11.JPG"),
        ("a1b2.png", "a1b10.png", "a2b1.png"),
        ("000.png", "001.png", "002.png"),
        ("1.5.png", "1.25.png", "2.png"),
        ("x.png", "x1.png", "Y.png", "z.png"),
    ],
)
def test_frames_are_in_the_order_of_their_numbers(names, tmp_path):
    write(tmp_path / "clip", *reversed(names))
    assert list_frames("clip", tmp_path) == tuple(f"clip/{name}" for name in names)


def test_other_files_are_not_frames(tmp_path):
    write(tmp_path / "clip", "1.png", "2.webp", "._1.png", ".hidden.png")
    for name in ("Thumbs.db", "meta.json", "audio.wav"):
        (tmp_path / "clip" / name).write_text("x")
    (tmp_path / "clip" / "inner").mkdir()
    assert list_frames("clip", tmp_path) == ("clip/1.png", "clip/2.webp")
    assert is_folder("clip", tmp_path)
    assert not is_folder("clip/1.png", tmp_path)
    assert not is_folder("none", tmp_path)
    assert not is_folder("data:video/mp4;base64," + "A" * 5000, tmp_path)


def test_faults_of_folders(tmp_path, monkeypatch):
    root = tmp_path / "root"
    write(root / "one", "1.png")
    write(tmp_path / "out", "1.png", "2.png")
    (root / "link").symlink_to(tmp_path / "out")
    fault = message_of(MediaFault, list_frames, "one", root)
    assert fault.startswith("video one: is a folder of 1 images (.jpg, .jpeg, ")
    assert fault.endswith("), a clip needs 2; check the path")
    for path in ("../out", str(tmp_path / "out")):
        fault = f"video {path}: is outside media_root {root}; move the file into it"
        assert message_of(MediaFault, is_folder, path, root) == fault
        assert message_of(MediaFault, list_frames, path, root) == fault
    assert "is a link to" in message_of(MediaFault, list_frames, "link", root)
    monkeypatch.setattr(folders, "_MAX_FRAMES", 2)
    write(root / "many", "1.png", "2.png")
    assert len(list_frames("many", root)) == 2
    write(root / "many", "3.png")
    fault = "video many: is a folder of more than 2 images; split it"
    assert message_of(MediaFault, list_frames, "many", root) == fault
