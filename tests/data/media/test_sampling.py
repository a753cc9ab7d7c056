"""Frames chosen from a part of a clip, at another rate, of a given number, at uneven times."""

import math
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.clips import ClipRules
from qwen3vl_train.data.media.sampling import Timeline, rules_of_clip
from tests.helpers.messages import message_of

RULES = ClipRules(2.0, 4, 768, 4096, 25165824)
BURST = [number / 30 for number in range(30)] + [1 + number / 2 for number in range(60)]
"""A second at 30 frames a second, then half a minute at two."""


def test_rate_and_number_equal_those_of_transformers():
    """Its processor, called with the fps or num_frames that a row asks for."""
    settings = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    rng = random.Random(0)
    for _ in range(500):
        total, rate = rng.randrange(8, 900), rng.choice([12.0, 24.0, 25.0, 30000 / 1001])
        fps, count = rng.choice([0.5, 1.0, 3.0, 7.5]), 2 * rng.randrange(1, 5)
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        for asked, given in (({"fps": fps}, (fps, None)), ({"num_frames": count}, (None, count))):
            wanted = Qwen3VLVideoProcessor.sample_frames(settings, metadata, **asked)
            assert Timeline(total, rate).choose(range(total), rules_of_clip(RULES, *given)) == wanted.tolist()


def test_numbers_of_frames_are_even_and_bounded():
    line = Timeline(20, 10.0)
    for asked, count in ((2, 2), (3, 4), (4, 4), (5, 4), (7, 8), (99, 20)):  # halves to a multiple of four
        assert len(line.choose(range(20), rules_of_clip(RULES, None, asked))) == count
    few = RULES._replace(max_frames=6)
    assert len(line.choose(range(20), rules_of_clip(few, None, 10))) == 6
    assert len(line.choose(range(20), rules_of_clip(few, 10.0, None))) == 6
    fault = "1 frames asked for, a clip needs 2; ask for more, or give an image"
    assert message_of(MediaFault, rules_of_clip, RULES, None, 1) == fault


@pytest.mark.parametrize("uneven", [False, True])
def test_segment_holds_the_frames_between_its_ends(uneven):
    times = [index / 25 for index in range(100)]
    line = Timeline(100, 25.0, times if uneven else None)
    assert line.segment(None, None) == range(100)
    assert line.segment(0.28, 1.0) == range(7, 26)  # 0.28 * 25 is 7.000000000000001
    assert line.segment(0.29, 0.99) == range(8, 25)
    assert line.segment(3.0, None) == range(75, 100)
    assert line.segment(None, 0.04) == range(2)
    assert line.segment(2.0, 4.9) == range(50, 100)  # annotations are rounded up
    ends = "the clip ends at 4.00 seconds"
    for start, end, fault in (
        (2.0, 2.0, f"{ends}, start 2 is not before end 2; correct start and end (in seconds)"),
        (4.0, 4.5, f"{ends}, start 4 is beyond it; correct start and end (in seconds)"),
        (500, 1000, f"{ends}, start 500 is beyond it; correct start and end (in seconds)"),
        (0.0, 5.1, f"{ends}, end 5.1 is beyond it; correct end (in seconds), or remove it to use the rest of the clip"),
        (0.05, 0.1, "1 of the clip's 100 frames (up to 3.96) between start 0.05 and end 0.1, 2 are needed; move them "
         "apart"),
    ):  # fmt: skip
        assert message_of(MediaFault, line.segment, start, end) == fault


def test_frames_of_a_segment_are_those_of_its_range():
    """From the first whole frame to the last, as qwen-vl-utils counts them: ceil(start * fps), floor(end * fps)."""
    rng = random.Random(0)
    for _ in range(300):
        total, rate = rng.randrange(200, 900), rng.choice([12.0, 24.0, 30.0])
        first = rng.randrange(100)
        start, end = (first - 0.5) / rate, (first + rng.randrange(20, 90) + 0.5) / rate
        line, span = Timeline(total, rate), range(math.ceil(start * rate), math.floor(end * rate) + 1)
        assert line.segment(start, end) == (span if first else range(span.stop))
        chosen = line.choose(span, RULES)
        assert (chosen[0], chosen[-1]) == (span[0], span[-1])
        assert len(chosen) == max(int(len(span) / rate * 2), 4)


def test_frames_of_uneven_times_are_nearest_to_even_ones():
    line = Timeline(90, 3.0, BURST)
    chosen = line.choose(range(90), RULES)
    assert chosen == sorted(set(chosen))
    times = [BURST[index] for index in chosen]
    assert (times[0], times[-1]) == (0.0, 30.5)
    assert len(times) == 61  # a rate of two, half a minute: 30 in the first second would be half of all
    assert sum(time < 1 for time in times) == 2
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) < 1.1
    assert line.choose(line.segment(0.0, 0.99), RULES) == [0, 10, 19, 29]


def test_even_times_are_sampled_like_a_rate():
    for total in range(8, 400):
        for rate in (12, 25, 29.97):
            line = Timeline(total, rate, [index / rate for index in range(total)])
            assert len(line.choose(range(total), RULES)) == len(Timeline(total, rate).choose(range(total), RULES))
    line = Timeline(250, 25, [index / 25 for index in range(250)])
    assert line.choose(range(250), RULES) == Timeline(250, 25).choose(range(250), RULES)


@pytest.mark.parametrize("asked", [4, 8, 20])
def test_where_a_picture_stays_the_least_number_is_kept(asked):
    """Two frames a minute apart, and 18 in the first second: the nearest to even times are two or three."""
    times = [index / 18 for index in range(18)] + [60.0, 120.0]
    line = Timeline(20, 0.16, times)
    assert line.choose(range(20), RULES)[-2:] == [18, 19]
    assert len(line.choose(range(20), RULES)) == 4
    chosen = line.choose(range(20), rules_of_clip(RULES, None, asked))
    assert len(chosen) == asked
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, 19)
