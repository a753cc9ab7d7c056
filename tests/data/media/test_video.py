"""Headers and frames of many containers and codecs, compared with full decoding; faults, safety and memory."""

import random
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import av
import pytest
import torch

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media import frame_times
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.video import read_header
from tests.helpers import clip_files, faults
from tests.helpers.clip_files import decode, trim_clip, write_clip
from tests.helpers.messages import message_of

OPEN_HEVC = "log-level=none:open-gop=1:keyint=8"
KINDS = {
    "mp4": ("a.mp4", {}),
    "long groups": ("a.mp4", {"gop": 250}),
    "b frames": ("a.mp4", {"options": {"x264-params": "bframes=3:b-pyramid=normal"}}),
    "open groups": ("a.mp4", {"options": {"x264-params": "open-gop=1:keyint=8:bframes=3:b-pyramid=normal"}}),
    "rolling refresh": ("a.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=8:bframes=2"}}),
    "hevc": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    "open groups of hevc": ("a.mp4", {"codec": "libx265", "options": {"x265-params": OPEN_HEVC}}),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"svtav1-params": "lp=1", "preset": "12"}}),
    "fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "index in front": ("a.mp4", {"container": {"movflags": "faststart"}, "audio": True}),
    "mov": ("a.mov", {"codec": "mpeg4"}),
    "mkv": ("a.mkv", {"audio": True}),
    "webm": ("a.webm", {"codec": "libvpx-vp9"}),
    "avi": ("a.avi", {"codec": "mpeg4"}),
    "avi out of order": ("a.avi", {"options": {"x264-params": "bframes=2"}}),
    "broadcast": ("a.ts", {}),
    "flv": ("a.flv", {}),
    "gif": ("a.gif", {"codec": "gif", "pixel_format": "rgb8"}),
    "29.97": ("a.mp4", {"rate": Fraction(30000, 1001)}),
    "odd size": ("a.mp4", {"size": (90, 50)}),
}  # fmt: skip


def gathered(source, indices, header=None, root=None) -> dict[int, torch.Tensor]:
    return dict(read_frames(source, indices, header or read_header(source, root), root))


@pytest.mark.parametrize("kind", KINDS)
def test_frames_equal_those_of_full_decoding(kind, tmp_path):
    name, options = KINDS[kind]
    path = write_clip(tmp_path / name, 40, **options)
    frames = decode(path)
    header = read_header(str(path))
    assert header[:5] == (40, pytest.approx(float(options.get("rate", 12))), *frames.shape[2:], 0)
    assert header.uneven == (kind == "gif")  # it counts in hundredths of a second, so its rate would be 12.5
    assert read_header(path.read_bytes()) == header
    for indices in ([0, 39], [39], [7], [5, 19, 20, 21, 38], [0, 13, 26, 39], list(range(40))):
        found = gathered(str(path), indices, header)
        assert sorted(found) == indices
        for index, frame in found.items():
            assert torch.equal(frame, frames[index]), (kind, indices, index)


def test_only_groups_with_wanted_frames_are_decoded(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 100, options={"x264-params": "keyint=10:scenecut=0:bframes=0"}))
    fed = faults.note_decoded_packets()
    for indices in ([0, 33, 99], [50], list(range(100))):
        gathered(path, indices)
    assert fed == [1 + 4 + 10, 1, 100]


def test_leading_frames_are_decoded_from_the_previous_key_frame(tmp_path):
    """In an open group some frames follow the key frame in the file and are shown before it; both groups make them."""
    path = str(write_clip(tmp_path / "a.mp4", 40, options=KINDS["open groups"][1]["options"]))
    fed, header = faults.note_decoded_packets(), read_header(path)
    for index in range(40):
        gathered(path, [index], header)
    assert len(fed) == 40, "a frame was withheld and all was decoded once more"
    assert 9 < max(fed) < 20, "no frame needs two groups, so this clip shows nothing; or one needs more"


def test_withheld_frame_is_decoded_again_from_the_beginning(tmp_path):
    """A key frame of this kind only starts to refresh the picture, so frames shortly after it need those before it."""
    path = write_clip(tmp_path / "a.mp4", 60, options={"x264-params": "intra-refresh=1:keyint=12:bframes=2"})
    fed = faults.note_decoded_packets()
    frames, header = decode(path), read_header(str(path))
    for wanted, passes in (([0, 3], 1), ([30], 2), ([41, 42, 43], 2), ([55], 2)):
        fed.clear()
        found = gathered(str(path), wanted, header)
        assert sorted(found) == wanted
        assert all(torch.equal(frame, frames[index]) for index, frame in found.items())
        assert len(fed) == passes


def test_frames_removed_by_an_edit_list_do_not_count(tmp_path):
    """A clip that was trimmed without encoding it again keeps the frames before the cut, unseen."""
    whole = write_clip(tmp_path / "a.mp4", 40, options={"x264-params": "bframes=2"})
    cut = trim_clip(whole, tmp_path / "cut.mp4", 5)
    frames, header = decode(whole)[5:], read_header(str(cut))
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 40
    assert header.num_frames == 35
    assert all(torch.equal(frame, frames[index]) for index, frame in gathered(str(cut), [0, 6, 34], header).items())


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("turn", [90, 180, -90])
def test_phone_rotation_is_applied(name, turn, tmp_path):
    path = write_clip(tmp_path / name, 12, rotation=turn)
    header = read_header(str(path))
    assert (header.height, header.width) == ((64, 96) if turn == 180 else (96, 64))
    wanted = torch.rot90(decode(path), turn // 90, dims=(2, 3))  # counter-clockwise, as the header counts
    for index, frame in gathered(str(path), [0, 5, 11], header).items():
        assert torch.equal(frame, wanted[index])
    with av.open(str(path)) as container:  # FFmpeg's own rotation of the same frames
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        turns = {90: ["cclock"], 180: ["clock", "clock"], -90: ["clock"]}[turn]
        ways = [graph.add("transpose", way) for way in turns]
        nodes = [graph.add_buffer(template=stream), *ways, graph.add("buffersink")]
        for first, second in pairwise(nodes):
            first.link_to(second)
        graph.configure()
        graph.push(next(container.decode(stream)))
        shown = torch.from_numpy(graph.pull().to_ndarray(format="rgb24")).permute(2, 0, 1)
    difference = (shown.float() - wanted[0].float()).abs()
    assert difference.mean() < 2  # colour is at half resolution, so turning before or after conversion differs a little


def both(source, root=None) -> str:
    """Return the fault of a source, which reading its header must raise."""
    return message_of(MediaFault, read_header, source, root)


UNREADABLE = "; replace it or write it as MP4"
DAMAGED = "is truncated, damaged or of an unsupported format (Invalid data found when processing input)" + UNREADABLE
INCOMPLETE = "; it is truncated or damaged, write it again"
NO_RATE = "not from 0.0001 to 1000; write the file again with its rate"


def test_faults_that_the_header_shows(tmp_path):
    root = tmp_path / "clips"
    root.mkdir()
    whole = write_clip(root / "whole.mp4", 40, container={"movflags": "faststart"}).read_bytes()
    half = len(whole) * 2 // 3
    (root / "cut.mp4").write_bytes(whole[:half])
    (root / "text.mp4").write_text("hello, I am no video")
    (root / "empty.mp4").write_bytes(b"")
    tail = write_clip(root / "tail.mp4", 40).read_bytes()  # its index is at the end
    (root / "tail.mp4").write_bytes(tail[: len(tail) // 2])
    for name in ("a.mkv", "a.avi"):
        data = write_clip(root / name, 40, codec="mpeg4").read_bytes()
        (root / name).write_bytes(data[: len(data) * 2 // 3])
    write_clip(root / "fast.mp4", 40, rate=2000)
    write_clip(root / "one.mp4", 1)
    with av.open(str(root / "sound.mp4"), "w") as out:
        clip_files._write_silence(out, out.add_stream("aac", rate=8000))
    with av.open(str(root / "none.mp4"), "w", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    real = str(root.resolve())
    faults = {
        "text.mp4": DAMAGED,
        "tail.mp4": DAMAGED,
        "empty.mp4": "is empty (0 bytes); copy the file again",
        "gone.mp4": f"no such file ({real}/gone.mp4); check the path and media_root",
        "../x.mp4": f"is outside media_root {root}; move the file into it",
        "sound.mp4": "has no video stream (streams: audio); replace the file",
        "fast.mp4": f"frame rate is 2000, {NO_RATE}",
        "one.mp4": "has 1 frame, a clip needs 2; replace it, or give the frame as an image",
        "none.mp4": f"frame rate is missing, {NO_RATE}",
        "s3://bucket/a.mp4": "is a s3 URL and nothing is downloaded; give a local path",
    }
    for name, fault in faults.items():
        assert both(name, root) == f"video {name}: {fault}"
    last = both("cut.mp4", root)
    assert last.startswith("video cut.mp4: is truncated: its header lists frames up to byte ")
    assert last.endswith(f", it has {half}; copy the file again")
    declared = "video a.mkv: is truncated: its header declares 3.3 seconds, its packets end at "
    assert both("a.mkv", root).startswith(declared)
    assert both("a.avi", root).startswith("video a.avi: its header declares 40 frames, ")
    assert both("a.avi", root).endswith(" were found" + INCOMPLETE)
    assert both(b"") == "video of 0 bytes: is empty; give the bytes of a video file"
    assert both("data:video/mp4,abc") == "data URI: is not base64; write data:video/mp4;base64,..."


def test_impossible_frame_rate_is_a_fault(tmp_path):
    data = bytearray(write_clip(tmp_path / "a.mp4", 12, options={"x264-params": "bframes=0"}).read_bytes())
    place = data.index(b"stts") + 16
    assert data[place : place + 4] == (1024).to_bytes(4, "big")  # a frame lasts 1024 of 12288 ticks a second
    data[place : place + 4] = (1).to_bytes(4, "big")
    assert both(bytes(data)) == f"video of {len(data)} bytes: frame rate is 12288, {NO_RATE}"


def test_faults_that_decoding_shows(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 40, options={"x264-params": "keyint=10"})
    avi = write_clip(tmp_path / "a.avi", 12, codec="mpeg4")
    turned = write_clip(tmp_path / "turned.mkv", 12, rotation=180)
    header, of_avi = read_header(str(path)), read_header(str(avi))
    for file, wanted, wrong, fault in (
        (path, [0, 30], header._replace(num_frames=41), f"its header declares 41 frames, 40 were found{INCOMPLETE}"),
        (path, [0, 30], header._replace(num_frames=39), f"its header declares 39 frames, 40 were found{INCOMPLETE}"),
        (avi, [0], of_avi._replace(num_frames=13), f"its header declares 13 frames, 12 were found{INCOMPLETE}"),
        (path, [0], header._replace(width=90), "a frame is 96x64, the header says 90x64; write it again in one size"),
        (turned, [0], None, "its frames are rotated by 180 degrees, its header says 0; write it again upright, or as "
         "MP4"),
    ):  # fmt: skip
        assert message_of(MediaFault, gathered, str(file), wanted, wrong) == f"video {file}: {fault}"
    slanted = write_clip(tmp_path / "slanted.mp4", 12, rotation=30)
    fault = "is mirrored or not rotated by a multiple of 90 degrees; write it again upright"
    assert both(str(slanted)) == f"video {slanted}: {fault}"


def test_disk_errors_are_transient(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4")

    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MediaFault) as caught:
        read_header(str(path))
    assert str(caught.value) == f"video {path}: cannot be read (Permission denied); check disk and permissions"
    assert caught.value.transient


def test_decompression_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    path = str(write_clip(tmp_path / "a.mp4", 4))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 6000)
    assert both(path) == (
        f"video {path}: 96x64 is more than 6000 pixels a frame, Pillow's limit against decompression bombs; "
        "shrink the file, or raise data.max_image_pixels if you trust it"
    )
    assert read_header(path, max_pixels=96 * 64).height == 64
    fault = "96x64 is more than 6143 pixels a frame, data.max_image_pixels; shrink the file, or raise"
    assert fault in message_of(MediaFault, read_header, path, None, 96 * 64 - 1)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{target}</BaseURL></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    ],
    ids=["playlist", "concat", "dash", "sdp"],
)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "mpd", "sdp"])
def test_files_that_refer_to_other_files_are_not_opened(text, ending, tmp_path):
    target = write_clip(tmp_path / "secret.mp4", 12)
    path = tmp_path / f"a.{ending}"
    path.write_text(text.format(target=target))
    assert both(str(path)).endswith(UNREADABLE)
    assert both(path.read_bytes()).endswith(UNREADABLE)


def test_bare_streams_have_no_rate_and_are_not_opened(tmp_path):
    assert both(str(write_clip(tmp_path / "a.h264", 12))).endswith(UNREADABLE)


def test_cover_art_is_not_a_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=8000)
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(clip_files.smooth(1, 64, 64)[0], format="rgb24")
        out.mux(cover.encode(frame.reformat(format="yuvj420p")))
        out.mux(cover.encode(None))
        clip_files._write_silence(out, sound)
    assert both(str(path)) == f"video {path}: has no video stream (streams: audio, video); replace the file"


def test_damaged_files_raise_media_fault_only(tmp_path):
    """Cut and flip bytes of every container: what is planned from the header decodes, or there is a fault."""
    rng = random.Random(0)
    kinds = ("mp4", "mkv", "avi", "broadcast", "flv", "gif")
    names = {KINDS[kind][0]: KINDS[kind][1] for kind in kinds} | {"a.mkv": {"codec": "mpeg4"}}
    whole = [write_clip(tmp_path / name, 8, size=(48, 32), **options).read_bytes() for name, options in names.items()]
    uneven = [0, 40, 80, 500, 540, 900, 2000, 2400]
    for name, options in (
        ("u.mp4", {}),
        ("u.webm", {"codec": "libvpx-vp9", "container": {"live": "1"}}),
        ("u.mkv", {}),
    ):
        whole.append(clip_files.write_timed(tmp_path / name, uneven, size=(48, 32), **options).read_bytes())
    refused = 0
    for turn in range(900):
        data = bytearray(whole[turn % len(whole)])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(1, 6) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = read_header(bytes(data))
            assert header.times is None or len(header.times) == header.num_frames
            assert 0 < header.fps <= 1000
            found = gathered(bytes(data), [0, header.num_frames - 1], header)
            assert sorted(found) == [0, header.num_frames - 1]
            assert all(frame.shape == (3, header.height, header.width) for frame in found.values())
        except MediaFault:
            refused += 1
    assert 250 < refused < 900


MEMORY = """
import sys
from qwen3vl_train.data.media.clips import ClipRules, clip_patches, resize_clip, sample_indices
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.video import read_header
from tests.helpers.messages import message_of

def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

rules = ClipRules(2.0, 4, 768, 4096, 25165824)
patches = None
for path in sys.argv[1:]:
    header = read_header(path)
    indices = sample_indices(header.num_frames, header.fps, rules)
    rows, cols = resize_clip(len(indices), header.height, header.width, min_pixels=4096, max_pixels=25165824)
    grid = (-(-len(indices) // 2), rows // 16, cols // 16)
    patches = clip_patches(read_frames(path, indices, header), indices, grid)
    print(header.num_frames, len(indices), patches.numel(), peak())
"""


@pytest.mark.measures
def test_ten_minute_clip_needs_little_memory(tmp_path):
    options = {"size": (128, 96), "codec": "mpeg4", "rate": 15, "gop": 60}
    short = write_clip(tmp_path / "short.mp4", 30, **options)
    with av.open(str(tmp_path / "long.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=15)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in clip_files.smooth(20, 96, 128)]
        for number in range(9000):
            frame = frames[number % 20]
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    command = [sys.executable, "-c", MEMORY, str(short), str(tmp_path / "long.mp4")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert after[:2] == [9000, 768]
    frames_bytes = 9000 * 128 * 96 * 3  # 332 MB; those that are sampled are 28 MB, and so are their patches
    grown = after[3] - before[3] - after[2]
    assert grown < 20e6 < frames_bytes / 10, f"{grown / 1e6:.0f} MB besides the patches"


def test_clip_that_declares_a_billion_frames_is_refused(tmp_path):
    write_clip(tmp_path / "a.mp4")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"stsz") + 8
    content[at : at + 8] = (1).to_bytes(4, "big") + (10**9).to_bytes(4, "big")
    fault = f"video of {len(content)} bytes: has 1,000,000,000 frames, more than 1,000,000; split it"
    assert message_of(MediaFault, read_header, bytes(content)) == fault


def test_gif_of_many_frames_is_bounded(monkeypatch):
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00" + b"\x02\x02\x44\x01\x00"
    head = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    content = head + frame * 100_000 + b";"
    assert read_header(content).num_frames == 100_000
    monkeypatch.setattr(frame_times, "MAX_FRAMES", 5_000)
    fault = f"video of {len(content)} bytes: has 5,001 frames, more than 5,000; split it"
    assert message_of(MediaFault, read_header, content) == fault
