"""What a row asks of one medium: its size, its limits, its part of a clip, its rate; costs and tokens agree on it."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qwen3vl_train.data.encode.media import measure, read_patches
from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.budgets import Budgets, PixelLimits, Size
from qwen3vl_train.data.media.clips import ClipRules
from qwen3vl_train.data.rows.boxes import Convention
from qwen3vl_train.data.rows.parse import RowRules
from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, TextPart, VideoPart
from tests.helpers.clip_files import decode, oracle_patches, smooth, write_clip, write_timed
from tests.helpers.messages import message_of

RULES = ClipRules(2.0, 4, 768, 4096, 25165824)
BUDGETS = Budgets(64 * 64, 512 * 512, RULES)


def grid_of(part, budgets=BUDGETS, root=None):
    return budgets.grid(measure(part, budgets, root).size)


def test_limits_of_an_image_replace_those_of_the_recipe():
    """transformers' own smart_resize, called with the limits that hold."""
    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randrange(20, 1200), rng.randrange(20, 1200)
        least, most = rng.choice([None, 3136, 40_000]), rng.choice([None, 50_176, 200_000])
        limits = {"min_pixels": least or min(64 * 64, most or 512 * 512), "max_pixels": most or 512 * 512}
        wanted = smart_resize(height, width, 32, **limits)
        grid = BUDGETS.grid(Size(height, width, 0, PixelLimits(least, most)))
        assert grid == (1, wanted[0] // 16, wanted[1] // 16)
        counted = BUDGETS.grid(Size(77, 99, 0, PixelLimits(least, most, height, width)))
        assert counted == grid


def test_the_recipe_stays_the_limit():
    huge = Size(4000, 4000)
    assert BUDGETS.grid(huge) == BUDGETS.grid(huge._replace(limits=PixelLimits(max_pixels=10**9))) == (1, 32, 32)
    assert BUDGETS.grid(huge._replace(limits=PixelLimits(min_pixels=10**8, max_pixels=10**9))) == (1, 32, 32)
    assert BUDGETS.grid(huge._replace(limits=PixelLimits(height=10**6, width=10**6))) == (1, 32, 32)
    assert BUDGETS.grid(Size(8, 8, 0, PixelLimits(min_pixels=10**8))) == (1, 32, 32)


@pytest.mark.parametrize("num_frames", [2, 4, 5, 7, 8])
def test_limits_of_a_clip_hold_for_one_frame(num_frames):
    size = Size(480, 640, num_frames, PixelLimits(max_pixels=50_176))
    _, rows, cols = BUDGETS.grid(size)
    assert 0.6 * 50_176 < rows * cols * 256 <= 50_176
    assert BUDGETS.grid(Size(480, 640, 4)) == (2, 30, 40)
    if num_frames % 2 == 0:
        assert (rows * 16, cols * 16) == smart_resize(480, 640, 32, min_pixels=4096, max_pixels=50_176)
    _, rows, cols = BUDGETS.grid(Size(48, 64, num_frames, PixelLimits(min_pixels=50_176)))
    assert rows * cols * 256 >= 50_176
    rng = random.Random(num_frames)
    for _ in range(200):
        size = Size(rng.randrange(32, 900), rng.randrange(32, 900), num_frames, PixelLimits(max_pixels=50_176))
        _, rows, cols = BUDGETS.grid(size)
        assert rows * cols * 256 <= 50_176, size
    few = replace(BUDGETS, clips=RULES._replace(max_pixels=4 * 65536))
    assert few.grid(Size(480, 640, 4, PixelLimits(min_pixels=10**6, max_pixels=10**6))) == few.grid(Size(480, 640, 4))


def test_a_shared_budget_shrinks_what_has_own_limits():
    sizes = [Size(512, 512, 0, PixelLimits(min_pixels=250_000)), Size(512, 512, 4, PixelLimits(max_pixels=100_000))]
    budgets = replace(BUDGETS, max_tokens_per_sample=100)
    own = [budgets.grid(size) for size in sizes]
    fitted = budgets.fit(sizes, own)
    assert sum(t * h * w for t, h, w in fitted) // 4 <= 100
    assert budgets.count_shrunk(sizes, fitted) == 2
    assert budgets.count_shrunk(sizes, own) == 1  # the clip, by its row


def test_image_of_another_size_is_resized_to_it():
    image = Image.fromarray(smooth(1, 70, 90)[0])
    part = ImagePart(image, PixelLimits(height=128, width=64))
    measured = measure(part, BUDGETS, None)
    assert measured.size[:2] == (70, 90)
    patches = read_patches(part, measured, BUDGETS.grid(measured.size), None)
    frame = torch.from_numpy(smooth(1, 70, 90)).permute(0, 3, 1, 2).contiguous()
    wanted = oracle_patches(frame, (128, 64)).view(-1, 3, 2, 256)[:, :, 0].reshape(-1, 768)
    assert torch.equal((patches.float() - 127.5) / 127.5, wanted)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", 100, rate=25, size=(64, 48)))


@pytest.mark.parametrize(
    ("keys", "indices"),
    [
        ({}, [0, 14, 28, 42, 57, 71, 85, 99]),
        ({"start": 1.0, "end": 2.0}, [25, 33, 42, 50]),
        ({"start": 1.0, "end": 2.0, "num_frames": 2}, [25, 50]),
        ({"end": 0.04}, [0, 1]),
        ({"start": 3.9}, [98, 99]),
        ({"target_fps": 1.0}, [0, 33, 66, 99]),
        ({"target_fps": 5.0, "end": 1.0}, [0, 6, 12, 19, 25]),
        ({"num_frames": 6}, [0, 20, 40, 59, 79, 99]),
        ({"num_frames": 6, "target_fps": 1.0}, [0, 20, 40, 59, 79, 99]),
    ],
)
def test_frames_and_times_of_a_part_of_a_clip(clip, keys, indices):
    """Times count from the beginning of the file, as qwen-vl-utils and transformers write them for video_start."""
    part = VideoPart(clip, **keys)
    measured = measure(part, BUDGETS, None)
    assert list(measured.indices) == indices
    padded = indices + indices[-1:] * (len(indices) % 2)
    pairs = zip(padded[::2], padded[1::2], strict=True)
    assert list(measured.times) == pytest.approx([(first + second) / 50 for first, second in pairs])
    assert not measured.uneven
    grid = BUDGETS.grid(measured.size)
    patches = read_patches(part, measured, grid, None)
    wanted = oracle_patches(decode(clip)[indices], (grid[1] * 16, grid[2] * 16))
    assert torch.equal((patches.float() - 127.5) / 127.5, wanted)


def test_faults_of_parts_of_clips_name_the_clip(clip, tmp_path):
    for keys, fault in (
        ({"start": 9.0}, "the clip ends at 4.00 seconds, start 9 is beyond it; correct start and end (in seconds)"),
        ({"start": 1.0, "end": 1.03}, "1 of the clip's 100 frames (up to 3.96) between start 1 and end 1.03, 2 are "
         "needed; move them apart"),
        ({"fps": 2.0}, "fps of a video file, whose header has the times; remove it"),
        ({"sample_fps": 2.0}, "sample_fps of a video file, whose header has the times; remove it"),
    ):  # fmt: skip
        assert message_of(MediaFault, measure, VideoPart(clip, **keys), BUDGETS, None) == f"video {clip}: {fault}"


def test_frames_of_an_uneven_clip_are_chosen_and_timed_truly(tmp_path):
    ticks = [*range(0, 1000, 20), *range(1000, 20000, 500)]
    path = str(write_timed(tmp_path / "a.webm", ticks, codec="libvpx-vp9", rate=50, size=(64, 48)))
    measured = measure(VideoPart(path), BUDGETS, None)
    assert measured.uneven
    times = [ticks[index] / 1000 for index in measured.indices]
    assert len(times) == 39  # 19.7 seconds at two a second; by the declared rate it would last 1.8 seconds
    padded = times + times[-1:] * (len(times) % 2)
    truth = [(first + second) / 2 for first, second in zip(padded[::2], padded[1::2], strict=True)]
    assert list(measured.times) == pytest.approx(truth)
    part = VideoPart(path, start=2.0, end=4.0)
    measured = measure(part, BUDGETS, None)
    assert [ticks[index] for index in measured.indices] == [2000, 2500, 3000, 3500, 4000]
    grid = BUDGETS.grid(measured.size)
    wanted = oracle_patches(decode(path)[list(measured.indices)], (grid[1] * 16, grid[2] * 16))
    assert torch.equal((read_patches(part, measured, grid, None).float() - 127.5) / 127.5, wanted)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(smooth(12, 48, 64)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    return str(tmp_path)


def test_folder_of_frames_equals_their_list(folder):
    listed = tuple(f"frames/{number}.png" for number in range(12))
    for keys in ({"fps": 6.0}, {"sample_fps": 3.0}, {"timestamps": tuple(map(float, range(12)))},
                 {"sample_fps": 3.0, "start": 1.0, "end": 2.0}, {"fps": 6.0, "num_frames": 4},
                 {"sample_fps": 3.0, "target_fps": 1.0}):  # fmt: skip
        of_list, of_folder = VideoPart(listed, **keys), VideoPart("frames", **keys)
        one, two = measure(of_list, BUDGETS, folder), measure(of_folder, BUDGETS, folder)
        assert one == two
        grid = BUDGETS.grid(one.size)
        assert torch.equal(read_patches(of_list, one, grid, folder), read_patches(of_folder, two, grid, folder))
    assert measure(VideoPart("frames", sample_fps=3.0), BUDGETS, folder).indices == tuple(range(12))
    assert measure(VideoPart("frames", sample_fps=3.0), BUDGETS, folder).times[:2] == pytest.approx((0.5 / 3, 2.5 / 3))
    assert measure(VideoPart("frames", sample_fps=3.0, start=1.0, end=2.0), BUDGETS, folder).indices == (3, 4, 5, 6)
    rate = VideoPart("frames", target_fps=6.0)  # rows write the rate of frames like the one to sample a file at
    assert measure(rate, BUDGETS, folder) == measure(VideoPart("frames", fps=6.0), BUDGETS, folder)


def test_faults_of_folders_say_what_to_write(folder):
    for keys, fault in (
        ({}, "is a folder of frames without their rate; write sample_fps next to it (all frames are used), or fps "
         "(they are sampled)"),
        ({"timestamps": (0.0, 1.0)}, "2 times for 12 frames; give one for each frame"),
        ({"sample_fps": 2.0, "start": 7.0}, "the clip ends at 6.00 seconds, start 7 is beyond it; correct start and "
         "end (in seconds)"),
    ):  # fmt: skip
        part = VideoPart("frames", **keys)
        assert message_of(MediaFault, measure, part, BUDGETS, folder) == f"video frames: {fault}"


def test_costs_are_the_encoded_lengths(collate, clip, folder):
    rng = random.Random(0)
    image = Image.fromarray(smooth(1, 300, 500)[0])
    parts = [
        ImagePart(image), ImagePart(image, PixelLimits(None, 20_000)), ImagePart(image, PixelLimits(90_000, None)),
        ImagePart(image, PixelLimits(3136, 50_176)), ImagePart(image, PixelLimits(height=64, width=640)),
        VideoPart(clip), VideoPart(clip, start=0.5, end=2.0, limits=PixelLimits(max_pixels=9000)),
        VideoPart(clip, num_frames=10, limits=PixelLimits(min_pixels=30_000)), VideoPart(clip, target_fps=0.5),
        VideoPart(f"{folder}/frames", sample_fps=3.0, limits=PixelLimits(height=32, width=96)),
    ]  # fmt: skip
    for budget in (None, 60, 200):
        limited = replace(collate, budgets=replace(collate.budgets, max_tokens_per_sample=budget))
        for _ in range(6):
            content = (*rng.sample(parts, 3), TextPart("What?"))
            sample = Sample((Message("user", content), Message("assistant", (TextPart("Yes"),), 1.0)))
            cost, encoded = limited.cost(sample), limited.encode(sample)
            assert cost.tokens == encoded.input_ids.numel()
            assert cost.patches == encoded.patches.shape[0] == 4 * cost.visual_tokens
            assert budget is None or cost.visual_tokens <= budget


def test_large_images_are_decoded_up_to_the_limit_of_the_recipe(collate, monkeypatch, tmp_path):
    Image.fromarray(smooth(1, 100, 100)[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    content = (ImagePart("a.png"), TextPart("What?"))
    sample = Sample((Message("user", content), Message("assistant", (TextPart("Yes"),), 1.0)), media_root=str(tmp_path))
    large = replace(collate, budgets=replace(collate.budgets, max_image_pixels=10_000))
    assert large.cost(sample).tokens == large.encode(sample).input_ids.numel()
    small = replace(collate, budgets=replace(collate.budgets, max_image_pixels=9_999))
    for encoder, fault in ((small, "9999 pixels, data.max_image_pixels"), (collate, "4000 pixels, Pillow's limit")):
        assert fault in message_of(MediaFault, encoder.cost, sample)
    row = {
        "messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "Where? <box>"}]},
                     {"role": "assistant", "content": "Here."}],
        "boxes": [[10, 20, 30, 40]],
    }  # fmt: skip
    boxed = RowRules(boxes=Convention("pixel")).sample(row, "row", str(tmp_path))  # reads the size, decodes nothing
    assert "[100, 200, 300, 400]" in boxed.messages[0].text
    assert large.fingerprint() != small.fingerprint()
