"""Sampling, times, sizes and patches of clips against transformers."""

import hashlib
import random

import numpy as np
import pytest
import torch

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media import clips
from tests.helpers import clip_files
from tests.helpers.messages import message_of

RULES = clips.ClipRules(2.0, 4, 768, 4096, 25165824)

# (frames, height, width, limit on the area of all frames): grid, and the SHA-256 (first 16 digits) of the patches of
# `clip_files.moving`, frozen from transformers 5.23's Qwen3VLVideoProcessor on torchvision 0.28, cap_pixels_per_frame
# False. Odd counts, a side below 32 pixels, growing to the minimum and shrinking to the maximum are among them.
GOLDEN = {
    (4, 96, 160, 25165824): ((2, 6, 10), "a46e6908972a3645"),
    (5, 64, 64, 25165824): ((3, 4, 4), "e6e1172f9e256b79"),
    (3, 100, 333, 25165824): ((2, 6, 20), "0696b809296301ac"),
    (8, 20, 50, 25165824): ((4, 2, 4), "6d0a1feb5af54f65"),
    (2, 31, 200, 25165824): ((1, 2, 12), "75f7690c060e52e4"),
    (7, 240, 320, 458752): ((4, 12, 18), "93ff3c8617f87c2a"),
    (6, 333, 500, 122880): ((3, 6, 10), "edf974076f2e2c62"),
    (9, 144, 176, 20480): ((5, 2, 2), "f6cbc6696865f568"),
    (2, 16, 16, 25165824): ((1, 4, 4), "7684b6e9764ab002"),
    (4, 500, 40, 32768): ((2, 20, 2), "df21c2ad7ecc652e"),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
@pytest.mark.parametrize("order", ["forwards", "backwards", "twice"])
def test_patches_are_bit_equal_to_transformers(case, order):
    count, height, width, most = case
    grid, digest = GOLDEN[case]
    size = clips.resize_clip(count, height, width, min_pixels=4096, max_pixels=most)
    assert ((count + 1) // 2, size[0] // 16, size[1] // 16) == grid
    frames = torch.from_numpy(clip_files.moving(count, height, width)).permute(0, 3, 1, 2)
    places = {"forwards": range(count), "backwards": reversed(range(count)), "twice": [*range(count), 1]}[order]
    patches = clips.clip_patches(((place, frames[place]) for place in places), range(count), grid)
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest()[:16] == digest
    ours = (patches.float() - 127.5) / 127.5
    assert torch.equal(ours, clip_files.oracle_patches(frames.contiguous(), size))  # holds the tests' own oracle too


def test_missing_frame_is_an_assertion_error():
    frame = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"frames \[7\] of the clip are missing"):
        clips.clip_patches([(3, frame)], [3, 7], (1, 2, 2))


@pytest.mark.parametrize(
    ("num_frames", "fps", "rules", "indices"),
    [
        (24, 12.0, RULES, [0, 8, 15, 23]),
        (250, 25.0, RULES, np.linspace(0, 249, 20).round().astype(int).tolist()),
        (120, 30000 / 1001, RULES, [0, 17, 34, 51, 68, 85, 102, 119]),
        (10, 30.0, RULES, [0, 3, 6, 9]),  # a third of a second: four frames at least
        (3, 30.0, RULES, [0, 1, 2]),  # never more than there are
        (9, 2.0, RULES, list(range(9))),
        (1000, 1.0, RULES._replace(max_frames=5), [0, 250, 500, 749, 999]),
        (100, 10.0, RULES._replace(fps=0.5), [0, 25, 50, 74, 99]),
        (100, 10.0, RULES._replace(fps=0.25, min_frames=2), [0, 99]),
    ],
)
def test_sampling(num_frames, fps, rules, indices):
    assert clips.sample_indices(num_frames, fps, rules) == indices


def test_times_equal_transformers():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    rng = random.Random(0)
    for _ in range(300):
        fps = rng.choice([12.0, 25.0, 30000 / 1001, rng.uniform(1, 60)])
        indices = sorted(rng.sample(range(1000), rng.randint(2, 30)))
        theirs = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps)
        assert clips.pair_times([index / fps for index in indices]) == theirs
    assert clips.pair_times([0.0, 8 / 12, 15 / 12, 23 / 12]) == pytest.approx([1 / 3, 19 / 12])
    assert clips.pair_times([0.0, 0.5, 1.0]) == [0.25, 1.0]


def test_sizes_equal_transformers():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rng = random.Random(0)
    shrunk = grown = 0
    for _ in range(5000):
        count, height = rng.randint(2, 40), rng.choice([rng.randint(1, 60), rng.randint(33, 1500)])
        width = rng.randint(max(1, height // 200 + 1), min(1500, height * 199))
        least = rng.choice([4096, 131072])
        most = least * rng.choice([1, 3, 50, 6144])
        theirs = smart_resize(count, height, width, factor=32, min_pixels=least, max_pixels=most)
        assert clips.resize_clip(count, height, width, min_pixels=least, max_pixels=most) == theirs
        area = count * theirs[0] * theirs[1]
        shrunk, grown = shrunk + (area < count * height * width // 2), grown + (area > count * height * width * 2)
    assert min(shrunk, grown) > 300


def test_extreme_shapes_are_refused():
    assert clips.resize_clip(4, 32, 6400, min_pixels=1024, max_pixels=10**9) == (32, 6400)
    fault = "frames of 6401x32: their aspect ratio exceeds 200:1; crop or pad them"
    assert message_of(MediaFault, clips.resize_clip, 4, 32, 6401, min_pixels=1024, max_pixels=10**9) == fault


def test_images_packed_with_clips_repeat_their_frame():
    still = torch.randint(0, 256, (8, 768), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    twice = clips.repeat_still_frames(still).view(8, 3, 2, 256)
    assert all(torch.equal(twice[:, :, frame].reshape(8, 768), still) for frame in range(2))
    assert clips.repeat_still_frames(twice.reshape(8, 1536)).shape == (8, 1536)
    assert clips.repeat_still_frames(still[:0]).shape == (0, 1536)
