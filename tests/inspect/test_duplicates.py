"""Which media are the same content."""

import base64

from PIL import Image

from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, VideoPart
from qwen3vl_train.inspect.duplicates import _media_digest


def digest(part, root) -> bytes:
    return _media_digest(Sample((Message("user", (part,)),), media_root=str(root)))


def test_one_picture_is_equal_however_it_is_given(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a b.png")
    data = (tmp_path / "a b.png").read_bytes()
    text = base64.b64encode(data).decode()
    sources = ("a b.png", data, text, f"data:image/png;base64,{text}", (tmp_path / "a b.png").as_uri())
    assert len({digest(ImagePart(source), tmp_path) for source in sources}) == 1


def test_segments_and_folders_of_clips_differ(tmp_path):
    for name, colours in (("one", ("red", "blue")), ("two", ("red", "green")), ("same", ("red", "blue"))):
        (tmp_path / name).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (9, 9), colour).save(tmp_path / name / f"{number}.png")
    one, two, same = (digest(VideoPart(name, sample_fps=1.0), tmp_path) for name in ("one", "two", "same"))
    assert one == same
    assert one != two
    (tmp_path / "a.mp4").write_bytes(b"clip")
    parts = (
        VideoPart("a.mp4"),
        VideoPart("a.mp4", start=1.0),
        VideoPart("a.mp4", end=1.0),
        VideoPart("a.mp4", num_frames=4),
    )
    assert len({digest(part, tmp_path) for part in parts}) == 4
