"""Clips as lists of frames, and images, measured from headers and decoded to patches."""

import io

import pytest
import torch
from PIL import Image

from qwen3vl_train.data.encode.media import measure, read_patches
from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.budgets import Budgets, Size
from qwen3vl_train.data.media.clips import ClipRules
from qwen3vl_train.data.rows.sample import ImagePart, VideoPart
from tests.helpers import clip_files
from tests.helpers.clip_files import moving, oracle_patches, write_clip
from tests.helpers.messages import message_of

RULES = ClipRules(2.0, 4, 768, 4096, 25165824)
BUDGETS = Budgets(64 * 64, 512 * 512, RULES)


@pytest.fixture
def frames(tmp_path):
    """Seven frames of 90x70 as PNG files in tmp_path, and their pixels (T, 3, H, W)."""
    pixels = moving(7, 70, 90)
    for place, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"{place}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def names(*places: int) -> tuple[str, ...]:
    return tuple(f"{place}.png" for place in places)


def patches(part, root) -> torch.Tensor:
    measured = measure(part, BUDGETS, root)
    return read_patches(part, measured, BUDGETS.grid(measured.size), root)


def test_frames_with_timestamps_are_all_used(frames, tmp_path):
    part = VideoPart(names(0, 2, 5), timestamps=(1.0, 1.5, 7.25))
    measured = measure(part, BUDGETS, str(tmp_path))
    assert measured[:4] == (Size(70, 90, 3), (0, 1, 2), (1.25, 7.25), None)
    wanted = oracle_patches(frames[[0, 2, 5]], (64, 96))
    assert torch.equal((patches(part, str(tmp_path)).float() - 127.5) / 127.5, wanted)


def test_frames_with_fps_are_sampled_like_a_video_file(frames, tmp_path):
    measured = measure(VideoPart(names(*range(7)), fps=3.5), BUDGETS, str(tmp_path))
    assert measured.indices == (0, 2, 4, 6)
    assert measured.times == pytest.approx((1 / 3.5, 5 / 3.5))
    clip = str(write_clip(tmp_path / "a.mp4", 24))
    listed = VideoPart(tuple(Image.fromarray(f.permute(1, 2, 0).numpy()) for f in clip_files.decode(clip)), fps=12.0)
    of_list, of_file = measure(listed, BUDGETS, None), measure(VideoPart(clip), BUDGETS, None)
    assert of_list[:3] == of_file[:3]
    assert of_file.times == pytest.approx((1 / 3, 19 / 12))
    assert torch.equal(patches(listed, None), patches(VideoPart(clip), None))


def test_frames_are_equal_from_every_input_type(frames, tmp_path):
    root = str(tmp_path)
    files = [(tmp_path / name).read_bytes() for name in names(0, 1, 2, 3)]
    opened = tuple(Image.open(io.BytesIO(data)) for data in files)
    wanted = patches(VideoPart(names(0, 1, 2, 3), fps=2.0), root)
    for sources in (tuple(files), opened, (names(0)[0], files[1], *opened[2:])):
        assert torch.equal(patches(VideoPart(sources, fps=2.0), root), wanted)


def test_faults_of_lists(frames, tmp_path):
    root, few = str(tmp_path), Budgets(64 * 64, 512 * 512, RULES._replace(max_frames=6))
    Image.new("RGB", (90, 71)).save(tmp_path / "odd.png")
    for part, budgets, fault in (
        (VideoPart(("0.png", "odd.png"), fps=2.0), BUDGETS, "image odd.png: is 90x71, the first frame of its clip "
         "90x70; give frames of one size"),
        (VideoPart(names(*range(7)), timestamps=tuple(map(float, range(7)))), few, "list of 7 frames: more than the "
         "limit of 6; give fewer, give fps instead of their times to have them sampled, or raise data.max_frames"),
        (VideoPart(("0.png", "../1.png"), fps=2.0), BUDGETS, f"image ../1.png: is outside media_root {root}; "
         "move the file into it"),
        (VideoPart("a.mp4"), Budgets(64, 64), "video: the checkpoint has no video_preprocessor_config.json; "
         "copy it from its publisher"),
    ):  # fmt: skip
        assert message_of(MediaFault, measure, part, budgets, root) == fault
    assert len(measure(VideoPart(names(*range(7)), fps=2.0), few, root).indices) == 6


def test_file_changed_after_it_was_measured_is_a_fault(frames, tmp_path):
    root = str(tmp_path)
    for part, name in ((VideoPart(names(0, 1), fps=2.0), "1.png"), (ImagePart("0.png"), "0.png")):
        measured = measure(part, BUDGETS, root)
        Image.new("RGB", (80, 70)).save(tmp_path / name)
        fault = f"image {name}: decodes to 80x70, its header says 90x70; replace it"
        assert message_of(MediaFault, read_patches, part, measured, (1, 4, 6), root) == fault
