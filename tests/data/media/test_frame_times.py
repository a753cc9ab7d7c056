"""Clips whose rate is uneven or wrong: their times against those that were written. Clips that begin late."""

from fractions import Fraction
from itertools import pairwise

import av
import pytest
import torch

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.frame_times import Frames
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.video import read_header
from tests.helpers.clip_files import decode, trim_clip, write_clip, write_timed
from tests.helpers.messages import message_of

OPEN_GROUPS = "open-gop=1:keyint=8:bframes=3:b-pyramid=normal"
BURST = [*range(0, 1000, 33), *range(1000, 20000, 500)]
"""Milliseconds: a second of a moving screen, then one that changes twice a second."""
DROPPED = [40 * number for number in range(100) if number not in (30, 31, 60)]
PHONE = [33 * number + number * 7 % 29 + number * number // 50 for number in range(120)]
FILES = {
    "mp4": ("a.mp4", {"options": {"x264-params": "bframes=0"}}),
    "mp4 out of order": ("a.mp4", {"options": {"x264-params": "bframes=3:b-pyramid=normal"}}),
    "mov": ("a.mov", {"codec": "mpeg4"}),
    "fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "mkv": ("a.mkv", {}),
    "mkv of another rate": ("a.mkv", {"rate": 30}),
    "webm": ("a.webm", {"codec": "libvpx-vp9"}),
    "webm without duration": ("a.webm", {"codec": "libvpx-vp9", "container": {"live": "1"}}),
    "flv": ("a.flv", {}),
    "broadcast": ("a.ts", {}),
    "asf": ("a.asf", {"codec": "mpeg4"}),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("ticks", [BURST, DROPPED, PHONE], ids=["burst", "dropped", "phone"])
def test_times_of_uneven_clips_are_those_written(kind, ticks, tmp_path):
    name, options = FILES[kind]
    path = write_timed(tmp_path / name, ticks, **options)
    header = read_header(str(path))
    assert header.uneven
    assert header.num_frames == len(ticks)
    assert header.times == pytest.approx([tick / 1000 for tick in ticks], abs=1e-3)
    assert header.fps == pytest.approx((len(ticks) - 1) / (ticks[-1] / 1000))
    assert read_header(path.read_bytes()) == header
    frames, wanted = decode(path), [0, 17, 31, len(ticks) - 1]
    found = dict(read_frames(str(path), wanted, header))
    assert sorted(found) == wanted
    assert all(torch.equal(found[index], frames[index]) for index in wanted)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.flv", "a.ts"])
def test_even_clip_of_an_unknown_rate_has_its_true_times(name, tmp_path):
    """Where a file says nothing, FFmpeg guesses: 24 here, though a frame lasts 40 ms."""
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    header = read_header(str(write_timed(tmp_path / name, range(0, 2000, 40), codec=codec)))
    assert header.fps == pytest.approx(25)
    assert [header.times[index] if header.uneven else index / 25 for index in (1, 49)] == pytest.approx([0.04, 1.96])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.flv", "a.ts", "a.avi"])
@pytest.mark.parametrize("rate", [12, 25, 60, Fraction(30000, 1001)], ids=str)
def test_even_clips_keep_their_declared_rate(name, rate, tmp_path):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write_clip(tmp_path / name, 100, rate=rate, codec=codec, size=(48, 32))
    header = read_header(str(path))
    with av.open(str(path)) as container:
        declared = container.streams.video[0].average_rate
    assert (header.fps, header.times) == (float(declared), None)


def test_trimmed_even_clip_is_even(tmp_path):
    """The frames before the cut are in the table, where the decoding order mixes them with those that are shown."""
    whole = write_clip(tmp_path / "a.mp4", 60, options={"x264-params": "bframes=3"})
    cut = trim_clip(whole, tmp_path / "cut.mp4", 7)
    header = read_header(str(cut))
    assert header.num_frames == 53
    spacing = header.times or [index / header.fps for index in range(53)]
    assert spacing == pytest.approx([index / 12 for index in range(53)], abs=0.5 / 12)


def test_rate_and_times_agree_up_to_half_a_frame_and_two_percent():
    def uneven(*times, rate=10.0, tick=0.001):
        return Frames(len(times), [round(time / tick) for time in times], tick, True).uneven_times(rate)

    even = [index / 10 for index in range(101)]
    assert uneven(*even) is None
    assert uneven(*even[:50], 5.049, *even[51:]) is None
    assert uneven(*even[:50], 5.056, *even[51:]) is not None  # one frame is more than half a frame late
    assert uneven(*(1.004 * time for time in even)) is None
    assert uneven(*(1.006 * time for time in even)) is not None  # 60 ms in ten seconds
    assert uneven(0.0, 0.1, 0.2, 0.304) is None
    assert uneven(0.0, 0.1, 0.2, 0.308) is not None  # less than half a frame, but more than 2% of the span
    assert uneven(0.0, 0.017, 0.033, rate=60.0) is None  # rounded to ticks
    assert uneven(0.0, 0.1, rate=None) == pytest.approx((0.0, 0.1))
    assert Frames(3, None, 0.001, True).uneven_times(None) is None
    assert uneven(0.0, 0.0, 0.0) is None  # a container that says nothing


def cut_between_keys(path, name):
    """Copy the packets from the key frame of an open group on, without the group before, which its first frames need.
    Return how many these are."""
    with av.open(str(path)) as source, av.open(str(path.with_name(name)), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        start = next(at for at, (one, two) in enumerate(pairwise(packets)) if one.is_keyframe and two.pts < one.pts)
        missing = sum(packet.pts < packets[start].pts for packet in packets[start:])
        for packet in packets[start:]:
            packet.stream = copy
            out.mux(packet)
    return missing


def test_mp4_that_hides_what_cannot_be_decoded_is_whole(tmp_path):
    """Its edit list begins at the key frame."""
    path = write_clip(tmp_path / "a.mp4", 40, options={"x264-params": OPEN_GROUPS})
    assert cut_between_keys(path, "cut.mp4") == 3
    header = read_header(str(tmp_path / "cut.mp4"))
    assert (header.num_frames, header.uneven) == (len(decode(tmp_path / "cut.mp4")), False)


@pytest.mark.parametrize("name", ["cut.mkv", "cut.ts"])
def test_clip_that_begins_between_key_frames_is_a_fault(name, tmp_path):
    path = write_clip(tmp_path / f"a{name[3:]}", 40, options={"x264-params": OPEN_GROUPS})
    assert cut_between_keys(path, name) == 3
    cut = str(tmp_path / name)
    fault = f"video {cut}: its first 3 frames cannot be decoded, as it was cut between two key frames; "
    assert message_of(MediaFault, read_header, cut) == f"{fault}write it again (ffmpeg -i OLD NEW.mp4)"


def test_recording_that_begins_without_a_key_frame_is_a_fault(tmp_path):
    path = write_clip(tmp_path / "a.ts", 40, options={"x264-params": "keyint=10:scenecut=0:bframes=0"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "cut.ts"), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and number > 3:
                packet.stream = copy
                out.mux(packet)
    assert "its first 6 frames cannot be decoded" in message_of(MediaFault, read_header, str(tmp_path / "cut.ts"))


@pytest.mark.parametrize("name", ["a.flv", "a.mkv", "a.webm", "a.mp4"])
def test_every_truncation_is_found_by_the_header_or_decodes(name, tmp_path):
    """What an index accepts is trained on: the frames that it counts are there, wherever the file was cut."""
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    whole = write_clip(tmp_path / name, 60, codec=codec).read_bytes()
    refused = 0
    for size in range(len(whole) // 3, len(whole), len(whole) // 50):
        try:
            header = read_header(whole[:size])
        except MediaFault:
            refused += 1
            continue
        wanted = [0, header.num_frames // 2, header.num_frames - 1]
        assert len(dict(read_frames(whole[:size], wanted, header))) == 3
    assert refused > 15
