"""Rows, files and pictures of junk end in a ValueError of ours: no other exception, no hang, no heap of memory.

Five seconds in all; QWEN3VL_FUZZ_SECONDS=60 looks longer. Seeds count from 0, so a failure comes again.
"""

import contextlib
import io
import json
import os
import resource
import time
from datetime import timedelta
from pathlib import Path
from types import FunctionType

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from PIL import Image
from tiny_files import KINDS, write_all

from qwen3vl_train.config.fields import TrainSource
from qwen3vl_train.data.boxes import Convention
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.data.faults import MediaFault, RowFault
from qwen3vl_train.data.media import image_size, load_rgb
from qwen3vl_train.data.rows import RowRules, decode_row
from qwen3vl_train.data.sources import open_sources, open_stream

SECONDS = float(os.environ.get("QWEN3VL_FUZZ_SECONDS", "5"))
SHARES = {"rows": 0.4, "text": 0.1, "files": 0.3, "pictures": 0.2}
SLOWEST = timedelta(seconds=10)  # one example; a hang is far longer, a busy machine far shorter
MEMORY_MIB = 600  # what the process may grow by: libraries load, buffers of a few files; a bomb asks for gigabytes


def fuzz(share: str, strategy: st.SearchStrategy, check: FunctionType) -> None:
    """Run `check` on examples until its share of the time is over; at least once through the smallest ones."""
    end, before, seed = time.monotonic() + SECONDS * SHARES[share], _peak_mib(), 0
    while True:
        settings = hypothesis.settings(
            max_examples=25, deadline=SLOWEST, database=None, suppress_health_check=list(HealthCheck)
        )

        @hypothesis.seed(seed)
        @settings
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


WORDS = st.sampled_from([
    "", "user", "assistant", "system", "tool", "human", "gpt", "function_call", "text", "image", "video", "<image>",
    "<video>\n", "<box>", "<point>", "<|im_end|>", "</think>", "<tool_response>", "a.png", "../a.png", "/etc/passwd",
    "http://127.0.0.1:1/a", "file:///etc/passwd", "s3://a/b", "data:image/png;base64,AAAA", "data:,", "\0", "\ud800",
    "[{}]",     "pixel", "unit", "xywh", "{\"name\": \"f\", \"arguments\": {}}",
])  # fmt: skip
SCALARS = st.one_of(
    WORDS, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=6),
    st.sampled_from([10**400, -1, 0, 1e308, float("nan")]),
)  # fmt: skip
KEYS = st.sampled_from([
    "role", "content", "from", "value", "type", "text", "image", "images", "video", "videos", "image_url", "url",
    "bytes", "path", "loss", "loss_weight", "tool_calls", "function", "name", "arguments", "tools", "system",
    "reasoning_content", "boxes", "points", "box", "point", "bbox", "bbox_layout", "data_path", "messages",
    "conversations", "question", "answer", "fps", "timestamps", "frames", "sample_fps",
])  # fmt: skip
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
PARTS = st.fixed_dictionaries({}, optional={
    "type": WORDS | st.sampled_from(["image", "text", "video"]), "text": WORDS | JUNK, "image": WORDS | JUNK,
    "video": JUNK, "fps": JUNK, "timestamps": JUNK,
})  # fmt: skip
MESSAGES = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "tool", "system"]) | SCALARS,
    "content": WORDS | st.lists(PARTS, max_size=4) | JUNK, "loss": JUNK, "loss_weight": JUNK, "tool_calls": JUNK,
    "reasoning_content": SCALARS, "from": st.sampled_from(["human", "gpt"]) | SCALARS, "value": WORDS | JUNK,
})  # fmt: skip
SOUND = st.fixed_dictionaries({"question": st.text(min_size=1), "answer": WORDS})
ROWS = SOUND | JUNK | st.fixed_dictionaries({}, optional={
    "messages": st.lists(MESSAGES, max_size=4) | JUNK, "conversations": st.lists(MESSAGES, max_size=4) | JUNK,
    "question": WORDS | JUNK, "answer": WORDS | JUNK, "image": WORDS | JUNK, "images": st.lists(WORDS, max_size=3),
    "video": JUNK, "tools": JUNK, "system": JUNK, "boxes": st.lists(st.lists(st.floats(), max_size=5), max_size=2),
    "points": JUNK, "bbox": WORDS | JUNK, "bbox_layout": WORDS | JUNK, "data_path": WORDS | JUNK,
})  # fmt: skip
RULES = st.builds(
    RowRules,
    format=st.sampled_from(["auto", "openai", "sharegpt", "columns"]),
    train_on=st.sampled_from(["all", "last"]),
    boxes=st.builds(
        Convention, st.sampled_from([None, "pixel", "unit", "per_mille"]), st.sampled_from(["xyxy", "xywh"])
    ),
    columns=st.sampled_from([{}, {"question": "text", "answer": "value"}]),
)


@pytest.fixture(scope="module")
def collate(tiny_folder):
    return MultimodalCollator.from_pretrained(tiny_folder)


def test_rows(collate, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    outcomes = set()

    def check(example):
        row, rules = example
        try:
            sample = rules.sample(row, "a:1", str(tmp_path))
            assert collate.encode(sample).input_ids.numel() == collate.cost(sample).tokens
            outcomes.add("sample")
        except RowFault:
            outcomes.add("fault")

    fuzz("rows", st.tuples(ROWS, RULES), check)
    assert outcomes == {"sample", "fault"}


def test_lines_of_text():
    def check(text):
        with contextlib.suppress(RowFault):
            decode_row(text)

    snippets = st.sampled_from(
        [b"{", b"[", b'"', b"\\u", b"1e999", b"NaN", b"-", b":", b",", b"\xff", b"\xef\xbb\xbf", b"["]
    )
    fuzz("text", st.lists(snippets, max_size=40).map(b"".join) | st.binary(max_size=60), check)
    with pytest.raises(RowFault, match=r"^not JSON"):
        decode_row(b"9" * 100_000)


@st.composite
def damages(draw):
    """A function that cuts, overwrites, doubles or drops stretches of bytes."""
    steps = draw(st.lists(st.tuples(st.sampled_from("cosd"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
                          min_size=1, max_size=4))  # fmt: skip

    def damage(content: bytes) -> bytes:
        for kind, where, junk in steps:
            at = int(where * len(content))
            if kind == "c":
                content = content[:at]
            elif kind == "o":
                content = content[:at] + junk + content[at + len(junk) :]
            elif kind == "s":
                content = content[:at] + junk + content[at:]
            else:
                content = content[:at] + content[at + 7 * len(junk) :]
        return content

    return damage


def test_files(tmp_path):
    files = {kind: path for kind, path in write_all(tmp_path).items() if path.is_file()}
    assert set(files) == set(KINDS) - {"saved"}
    whole = {kind: path.read_bytes() for kind, path in files.items()}
    unnamed: list[ValueError] = []
    cache = Path(os.environ["QWEN3VL_TRAIN_CACHE"]) / "unpacked"

    def check(example):
        kind, damage = example
        files[kind].write_bytes(damage(whole[kind]))
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

    fuzz("files", st.tuples(st.sampled_from(sorted(files)), damages()), check)
    assert not unnamed


def test_pictures():
    encoded = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        out = io.BytesIO()
        Image.linear_gradient("L").resize((40, 30)).convert("P" if kind == "GIF" else "RGB").save(out, kind)
        encoded[kind] = out.getvalue()

    def check(example):
        kind, damage = example
        content = damage(encoded[kind])
        for read in (image_size, load_rgb):
            with contextlib.suppress(MediaFault):
                read(content)

    fuzz("pictures", st.tuples(st.sampled_from(sorted(encoded)), damages()), check)
