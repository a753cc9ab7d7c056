"""Rows, files, pictures and clips of junk end in our ValueError: no other exception, no hang, no large allocation.

Five seconds in all; CI sets QWEN3VL_FUZZ_SECONDS=60. Seeds count from 0, so a failure comes again. Media are decoded in
a child process: a crash in C is a failure like any other.
"""

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_train.config.data_fields import TrainSource
from qwen3vl_train.data.errors import MediaFault, RowFault
from qwen3vl_train.data.media.image import image_size, load_rgb
from qwen3vl_train.data.rows.boxes import Convention
from qwen3vl_train.data.rows.formats import FORMATS
from qwen3vl_train.data.rows.parse import RowRules, decode_row
from qwen3vl_train.data.sources import open_sources, open_stream
from tests.helpers.clip_files import write_clip
from tests.helpers.row_files import KINDS, write_all

SECONDS = float(os.environ.get("QWEN3VL_FUZZ_SECONDS", "5"))
SHARES = {"rows": 0.3, "text": 0.05, "files": 0.25, "pictures": 0.15, "clips": 0.25}
SLOWEST = timedelta(seconds=10)  # one example; a hang is far longer, a busy machine far shorter
MEMORY_MIB = 600  # what a process may grow by: libraries load, buffers of a few files; a bomb asks for gigabytes
ADDRESSES_MIB = 8192  # more than a child may ever reserve: the machine that runs the tests must outlive a bomb


def fuzz(share: str, strategy: st.SearchStrategy, check: FunctionType) -> None:
    """Run `check` on examples until its share of the time is used; at least once through the smallest ones."""
    end, before, seed = time.monotonic() + SECONDS * SHARES[share], _peak_mib(), 0
    while True:

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=25, deadline=SLOWEST, database=None, suppress_health_check=list(HealthCheck))
        @hypothesis.given(strategy)
        def examples(example):
            check(example)

        examples()
        seed += 1
        if time.monotonic() > end:
            break
    assert _peak_mib() - before < MEMORY_MIB


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Guarded:
    """Calls a function in a child process; that it raises, crashes, hangs or takes much memory is an AssertionError.

    The child is kept from call to call, and a new one replaces one that failed.
    """

    def __init__(self, function: Callable[[Any], Any], seconds: float = SLOWEST.total_seconds()) -> None:
        self.function, self.seconds = function, seconds
        self.child: Any = None

    def __call__(self, example: Any) -> Any:
        if self.child is None:
            self._start()
        result, grown = None, 0.0
        try:
            self.pipe.send(example)
            if self.pipe.poll(self.seconds):
                result, fault, grown = self.pipe.recv()
            else:
                fault = f"no answer within {self.seconds} seconds"
        except (EOFError, ConnectionError):
            self.child.join()
            fault = f"the child died, exit code {self.child.exitcode}"
        if grown >= MEMORY_MIB:
            fault = f"took {grown:.0f} MiB"
        if fault is not None:
            self.stop()
            raise AssertionError(fault)
        return result

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.child = multiprocessing.get_context("fork").Process(target=_serve, args=(self.function, theirs))
        self.child.start()
        theirs.close()

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            self.pipe.close()
            self.child = None


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Answer each example with (result, what was raised or None, MiB that the peak of memory has grown by)."""
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + (ADDRESSES_MIB << 20), resource.RLIM_INFINITY))
    before = _peak_mib()
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            example, result, fault = pipe.recv(), None, None
            try:
                result = function(example)
            except Exception:  # whatever it is, only the parent can report it
                fault = traceback.format_exc()
            pipe.send((result, fault, _peak_mib() - before))


@pytest.fixture
def guarded():
    """A function: as `Guarded`. The children end with the test."""
    made: list[Guarded] = []

    def make(*arguments: Any) -> Guarded:
        made.append(Guarded(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def _misbehave(how: str) -> str:
    if how == "crash":
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "hang":
        time.sleep(60)
    elif how == "bomb":
        assert b"x" * (MEMORY_MIB + 50 << 20)
    elif how == "raise":
        raise KeyError("no fault of ours")
    return "done"


FAILURES = {
    "crash": "the child died, exit code -11",
    "hang": "no answer within 3.0 seconds",
    "bomb": r"took \d+ MiB",
    "raise": "KeyError: 'no fault of ours'",
}


@pytest.mark.parametrize("how", FAILURES)
def test_guarded_function_reports_its_failures(guarded, how):
    call = guarded(_misbehave, 3.0 if how == "hang" else 30.0)
    assert call("behave") == "done"
    with pytest.raises(AssertionError, match=FAILURES[how]):
        call(how)
    assert call("behave") == "done"


WORDS = st.sampled_from([
    "", "user", "assistant", "system", "tool", "human", "gpt", "function_call", "text", "image", "video", "<image>",
    "<video>\n", "<box>", "<point>", "<|im_end|>", "</think>", "<tool_response>", "a.png", "../a.png", "/etc/passwd",
    "http://127.0.0.1:1/a", "file:///etc/passwd", "s3://a/b", "data:image/png;base64,AAAA", "data:,", "\0", "\ud800",
    "[{}]",     "pixel", "unit", "xywh", "{\"name\": \"f\", \"arguments\": {}}", "<IMG_CONTEXT>", "<img>a.png</img>",
    "<image 1>", "<|image_1|>", "[IMG]", "<bbox>", "<ref-object>", "tool_call", "developer", "tool_use", "tool_result",
    "thinking", "image_url", "video_url", "norm1", "1.5", '[{"type": "text", "text": "a"}]', '["a.png"]',
])  # fmt: skip
SCALARS = st.one_of(
    WORDS, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=6),
    st.sampled_from([10**400, -1, 0, 1e308, float("nan")]),
)  # fmt: skip
KEYS = st.sampled_from([
    "role", "content", "from", "value", "type", "text", "image", "images", "video", "videos", "image_url", "url",
    "bytes", "path", "loss", "loss_weight", "tool_calls", "function", "name", "arguments", "tools", "system",
    "reasoning_content", "boxes", "points", "box", "point", "bbox", "bbox_layout", "data_path", "messages",
    "conversations", "question", "answer", "fps", "timestamps", "frames", "sample_fps", "texts", "prompt", "completion",
    "objects", "ref", "bbox_type", "image_id", "input", "history", "query", "response", "base64", "source", "data",
    "min_pixels", "max_pixels", "resized_height", "resized_width", "nframes", "start", "end", "video_start", "weight",
    "user", "function_call", "input_schema", "functions", "segment", "<image_00>",
])  # fmt: skip
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
PARTS = st.fixed_dictionaries({}, optional={
    "type": WORDS | st.sampled_from(["image", "text", "video"]), "text": WORDS | JUNK, "image": WORDS | JUNK,
    "video": JUNK, "fps": JUNK, "timestamps": JUNK, "path": WORDS | JUNK, "url": WORDS | JUNK, "base64": WORDS | JUNK,
    "source": JUNK, "value": JUNK, "max_pixels": SCALARS, "resized_height": SCALARS, "nframes": SCALARS,
    "video_start": SCALARS, "input": JUNK, "content": JUNK, "thinking": SCALARS,
})  # fmt: skip
MESSAGES = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "tool", "system"]) | SCALARS,
    "content": WORDS | st.lists(PARTS, max_size=4) | JUNK, "loss": JUNK, "loss_weight": JUNK, "tool_calls": JUNK,
    "reasoning_content": SCALARS, "weight": SCALARS, "function_call": JUNK,
    "from": st.sampled_from(["human", "gpt"]) | SCALARS, "value": WORDS | JUNK,
})  # fmt: skip
VALID = st.fixed_dictionaries({"question": st.text(min_size=1), "answer": WORDS})
ROWS = VALID | JUNK | st.fixed_dictionaries({}, optional={
    "messages": st.lists(MESSAGES, max_size=4) | JUNK, "conversations": st.lists(MESSAGES, max_size=4) | JUNK,
    "question": WORDS | JUNK, "answer": WORDS | JUNK, "image": WORDS | JUNK, "images": st.lists(WORDS, max_size=3),
    "video": JUNK, "tools": JUNK, "system": JUNK, "boxes": st.lists(st.lists(st.floats(), max_size=5), max_size=2),
    "points": JUNK, "bbox": WORDS | JUNK, "bbox_layout": WORDS | JUNK, "data_path": WORDS | JUNK,
    "texts": JUNK | st.lists(st.fixed_dictionaries({"user": WORDS, "assistant": WORDS}), max_size=2),
    "prompt": WORDS | JUNK, "completion": WORDS | JUNK, "input": WORDS | JUNK, "history": JUNK, "start": SCALARS,
    "end": SCALARS, "segment": JUNK, "sample_fps": SCALARS,
    "objects": JUNK | st.fixed_dictionaries({}, optional={"ref": JUNK, "bbox": JUNK, "bbox_type": WORDS}),
}) | st.lists(MESSAGES, max_size=3)  # fmt: skip
RULES = st.builds(
    RowRules,
    format=st.sampled_from(["auto", *FORMATS]),
    train_on=st.sampled_from(["all", "last"]),
    boxes=st.builds(
        Convention, st.sampled_from([None, "pixel", "unit", "per_mille"]), st.sampled_from(["xyxy", "xywh"])
    ),
    columns=st.sampled_from(
        [{}, {"question": "text", "answer": "value"}, {"image": ("image", "value"), "boxes": "bbox"}]
    ),
    texts=st.sampled_from([{}, {"question": "What?"}, {"answer": "<box>", "system": "Short."}]),
)


def test_rows(collate, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    results = set()

    def check(example):
        row, rules = example
        try:
            sample = rules.sample(row, "a:1", str(tmp_path))
            assert collate.encode(sample).input_ids.numel() == collate.cost(sample).tokens
            results.add("sample")
        except RowFault:
            results.add("fault")

    fuzz("rows", st.tuples(ROWS, RULES), check)
    assert results == {"sample", "fault"}


def test_lines_of_text():
    def check(text):
        with contextlib.suppress(RowFault):
            decode_row(text)

    snippets = [b"{", b"[", b'"', b"\\u", b"1e999", b"NaN", b"-", b":", b",", b"\xff", b"\xef\xbb\xbf", b"["]
    fuzz("text", st.lists(st.sampled_from(snippets), max_size=40).map(b"".join) | st.binary(max_size=60), check)
    with pytest.raises(RowFault, match=r"^not JSON"):
        decode_row(b"9" * 100_000)


# Overwrite, cut, insert or drop bytes at a position, given as a fraction of the file; half the time near its beginning
# or end, where headers and tables are. Numbers there turn into the largest and smallest.
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "overwrite", "insert", "drop"]),
        st.floats(0, 1) | st.floats(0, 0.05) | st.floats(0.9, 1),
        st.binary(min_size=1, max_size=9)
        | st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 4, b"\0\0\0\1", b"\xff" * 8]),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, damages: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, junk in damages:
        at = int(where * len(content))
        skipped = {"cut": len(content), "overwrite": len(junk), "insert": 0, "drop": 7 * len(junk)}[kind]
        content = content[:at] + (junk if kind in ("overwrite", "insert") else b"") + content[at + skipped :]
    return content


def damaged_ones(encoded: dict[str, bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(damaged, st.sampled_from([encoded[name] for name in sorted(encoded)]), DAMAGES)


def test_files(tmp_path):
    files = {kind: path for kind, path in write_all(tmp_path).items() if path.is_file()}
    assert set(files) == set(KINDS) - {"saved"}
    whole = {kind: path.read_bytes() for kind, path in files.items()}
    unnamed: list[ValueError] = []
    cache = Path(os.environ["QWEN3VL_TRAIN_CACHE"]) / "unpacked"

    def check(example):
        kind, damages = example
        files[kind].write_bytes(damaged(whole[kind], damages))
        entry = TrainSource(path=str(files[kind]))
        for read in (by_number, as_stream):
            try:
                read(entry)
            except ValueError as error:
                unnamed.extend([] if str(files[kind]) in str(error) else [error])
        for copy in cache.glob("*"):
            copy.unlink()

    def by_number(entry):
        (source,) = open_sources(entry)
        for row in range(len(source)):
            with contextlib.suppress(RowFault):
                source.sample(row)

    def as_stream(entry):
        for row in open_stream(entry).rows():
            json.dumps(row.state)

    fuzz("files", st.tuples(st.sampled_from(sorted(files)), DAMAGES), check)
    assert not unnamed


def test_pictures(guarded):
    encoded = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        out = io.BytesIO()
        Image.linear_gradient("L").resize((40, 30)).convert("P" if kind == "GIF" else "RGB").save(out, kind)
        encoded[kind] = out.getvalue()

    def read(content):
        result = "decoded"
        for step in (image_size, load_rgb):
            try:
                step(content)
            except MediaFault:
                result = "fault"
        return result

    call, results = guarded(read), set()
    fuzz("pictures", damaged_ones(encoded), lambda example: results.add(call(example)))
    assert results == {"decoded", "fault"}


CLIPS = {
    "a.mp4": {},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "turned.mov": {"codec": "mpeg4", "rotation": 90, "audio": True},
    "a.mkv": {"audio": True},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.avi": {"codec": "mpeg4"},
}


def test_clips(guarded, collate, tmp_path):
    """Clips as bytes are encoded to tokens and patches: header, times, frames, resizing."""
    small = {"size": (64, 48), "gop": 4}
    encoded = {name: write_clip(tmp_path / name, 10, **small, **how).read_bytes() for name, how in CLIPS.items()}

    def read(content):
        parts = [{"type": "video", "video": content}, {"type": "text", "text": "What?"}]
        row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A clip."}]}
        try:
            assert collate.encode(row).input_ids.numel() == collate.cost(row).tokens
        except MediaFault:
            return "fault"
        return "encoded"

    call, results = guarded(read), set()
    for name, content in encoded.items():
        assert call(content) == "encoded", name
    fuzz("clips", damaged_ones(encoded), lambda example: results.add(call(example)))
    assert results == {"encoded", "fault"}
