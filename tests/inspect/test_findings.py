"""Findings of a source: shares of rows, faults of clips, conventions of boxes, no usable row."""

import base64
import json
import shutil

import av
import pytest
from PIL import Image

from qwen3vl_train.data.rows.sample import ImagePart, Message, Sample, VideoPart
from qwen3vl_train.inspect.duplicates import _media_digest
from qwen3vl_train.inspect.page import render_page
from qwen3vl_train.inspect.recipe import inspect_recipe
from tests.helpers.clip_files import write_clip
from tests.helpers.finding_rows import finding_rows_recipe
from tests.helpers.small_runs import picture, row, write_rows


@pytest.fixture
def inspected(tiny_folder, tmp_path):
    """Return a function: rows, other fields of data and of the entry -> their inspection."""

    def look(rows, entry=None, train=None, **data):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        data = {"num_workers": 0, "max_tokens_per_pack": 512, "train": [{"path": str(file), **(entry or {})}], **data}
        sections = {"data": data} | ({"train": train} if train else {})
        return inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, **sections))

    return look


def found(inspection, check):
    """Return the only finding of a check, None if there is none."""
    findings = [finding for finding in inspection.facts.findings if finding.check == check]
    assert len(findings) <= 1
    return findings[0] if findings else None


def clip_row(video, **more):
    question = {"role": "user", "content": [{"type": "video", "video": video, **more}]}
    return {"messages": [question, {"role": "assistant", "content": "A clip."}]}


def test_clips_without_a_usable_rate_are_found(inspected, tmp_path):
    picture(64, 64, 0).save(tmp_path / "a.png")
    write_clip(tmp_path / "fast.mp4", 40, rate=2000)
    write_clip(tmp_path / "whole.mp4", 8)
    with av.open(str(tmp_path / "none.mp4"), "w", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    frames = ["a.png", "a.png"]
    inspection = inspected([
        clip_row("fast.mp4"),
        clip_row("none.mp4"),
        clip_row(frames),
        clip_row(frames, fps=0),
        clip_row(frames, sample_fps="fast"),
        # From here on, nothing is wrong with a rate.
        row("gone", "gone", ["run_60fps.png"]),
        row("gone", "gone", ["the frame rate is 60.png"]),
        clip_row("clip with no times fps.mp4"),
        clip_row("whole.mp4", timestamps=[0, 1]),
        clip_row(frames, fps=2, timestamps=[0, 1]),
        clip_row(frames, timestamps=[0]),
        clip_row("whole.mp4"),
    ])  # fmt: skip
    finding = found(inspection, "fps_missing")
    assert (finding.rows, finding.count, finding.evidence) == (list("12345"), 5, "5 of 12 rows (41.7%)")
    assert inspection.facts.sources[0].rejected == 11


@pytest.mark.parametrize("answer", [clip_row(["a.png", "a.png"], fps=2, timestamps=[0, 1]), clip_row("60fps.mp4")])
def test_other_faults_of_clips_are_not_a_missing_rate(inspected, tmp_path, answer):
    picture(64, 64, 0).save(tmp_path / "a.png")
    assert found(inspected([answer, row("a", "b")]), "fps_missing") is None


def test_every_row_without_a_rate_is_counted(inspected, tmp_path):
    picture(64, 64, 0).save(tmp_path / "a.png")
    inspection = inspected([clip_row(["a.png", "a.png"])] * 60 + [row("a", "b")])
    finding = found(inspection, "fps_missing")
    assert (finding.count, len(finding.rows)) == (60, 50)


@pytest.mark.parametrize(("size", "check"), [((640, 480), "shrunk"), ((12, 12), "enlarged")])
def test_image_sizes_far_from_the_limits_in_many_rows(inspected, tmp_path, size, check):
    picture(96, 64, 0).save(tmp_path / "fits.png")
    picture(*size, 0).save(tmp_path / "odd.png")
    budget = {"max_visual_tokens_per_image": 24, "min_visual_tokens_per_image": 4}
    usual = [row(f"What? {number}", "That.", ["fits.png"]) for number in range(9)]
    text = [row(f"What? {number}", "That.") for number in range(20)]  # no share of these is asked for
    finding = found(inspected([*usual, row("Large?", "Yes.", ["odd.png"]), *text], **budget), check)
    assert (finding.level, finding.rows, finding.evidence) == ("warning", ["10"], "1 of 10 rows with images (10%)")
    more = row("One more?", "Yes.", ["fits.png"])
    assert found(inspected([*usual, row("Large?", "Yes.", ["odd.png"]), more], **budget), check) is None


ODD = {"boxes_pixel": "[10, 20, 3000, 40]", "boxes_unit": "[0.1, 0.2, 0.3, 0.4]", "boxes_xywh": "[600, 700, 90, 80]"}


@pytest.mark.parametrize("check", ODD)
def test_odd_boxes_are_an_error_from_one_in_twenty_rows(inspected, tmp_path, check):
    picture(96, 64, 0).save(tmp_path / "a.png")
    valid = [row(f"Where? {number}", f"[{number}, 20, 900, 950]", ["a.png"]) for number in range(20)]
    text = [row(f"What? {number}", "That.", ["a.png"]) for number in range(20)]  # no share of these is asked for
    odd = row("Where?", ODD[check], ["a.png"])
    finding = found(inspected([odd, *valid[:19], *text]), check)
    assert (finding.level, finding.evidence) == ("error", "1 of 20 rows with boxes (5%)")
    few = found(inspected([odd, *valid]), check)
    assert (few.level, few.rows) == ("note", ["1"])


def grounding(tmp_path, size, boxes):
    """Return rows with one listed box each, of an image of this size."""
    picture(*size, 0).save(tmp_path / "a.png")
    return [
        {"image": "a.png", "question": f"<image>Where? {number}", "answer": "at <box>", "boxes": [box]}
        for number, box in enumerate(boxes)
    ]


THOUSANDTHS = [[20 * number, 30, 400 + 24 * number, 500 + 20 * number] for number in range(25)]  # they end at 976, 980


def test_thousandths_declared_as_pixels_of_large_images(inspected, tmp_path):
    rows = grounding(tmp_path, (1600, 1300), THOUSANDTHS)
    finding = found(inspected(rows, entry={"bbox": "pixel"}), "boxes_shrunk")
    assert finding.level == "warning"
    assert finding.count == sum(box[2] >= 902 or box[3] >= 902 for box in THOUSANDTHS)
    assert found(inspected(rows, entry={"bbox": "per_mille"}), "boxes_shrunk") is None
    by_row = [{**one, "bbox": "pixel"} for one in rows]
    assert found(inspected(by_row), "boxes_shrunk") is not None


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((1600, 1300), [*THOUSANDTHS, [10, 20, 1300, 900]]),  # one goes beyond 1000
        ((1600, 1300), [[x1 // 2, y1, x2 // 2, y2 // 2] for x1, y1, x2, y2 in THOUSANDTHS]),  # none comes near it
        ((1150, 1150), THOUSANDTHS),  # pixels of such a picture may well end there
        ((1600, 1300), THOUSANDTHS[6:]),  # too few to say
    ],
)
def test_boxes_in_pixels_of_large_images_are_accepted(inspected, tmp_path, size, boxes):
    assert found(inspected(grounding(tmp_path, size, boxes), entry={"bbox": "pixel"}), "boxes_shrunk") is None


BROKEN = ["not json", row("gone", "gone", ["missing.png"]), {"messages": [{"role": "user", "content": "no answer"}]}]


def test_without_a_usable_row_the_reasons_are_shown(inspected):
    inspection = inspected(BROKEN)
    (source,) = inspection.facts.sources
    assert (source.rows, source.usable, source.rejected, source.tokens) == (3, 0, 3, 0)
    reasons = [group.reason for group in source.rejects]
    assert [reason.split(" ")[0] for reason in reasons] == ["not", "messages[0].content[0]:", "nothing"]
    packs = inspection.facts.packs
    assert (packs.packs, packs.steps_per_epoch, packs.num_steps, packs.mean_fill) == (0, 0, 0, 0.0)
    evidence = {finding.check: finding.evidence for finding in inspection.facts.findings}
    assert evidence["no_rows"] == "3 of 3 rows (100%)"
    assert evidence.keys() == {"no_rows", "rejects", "nothing_to_learn"}  # nothing is said of packs that are not there
    assert (inspection.samples, inspection.pack) == ([], None)
    assert "missing.png: no such file" in render_page(inspection)
    json.dumps(inspection.facts.to_json(), allow_nan=False)


def test_without_any_row(inspected):
    assert found(inspected([]), "no_rows").evidence == "0 of 0 rows"


def test_rows_that_are_all_too_long_count_as_dropped(inspected):
    inspection = inspected([row("a", "b " * 3000)], too_long="drop")
    assert (inspection.facts.sources[0].dropped, found(inspection, "rejects")) == (1, None)
    assert found(inspection, "no_rows").evidence == "1 of 1 rows (100%)"


@pytest.mark.parametrize("rows", [BROKEN, []])
def test_stream_without_a_usable_row(inspected, rows):
    inspection = inspected(rows, entry={"streaming": True}, train={"num_steps": 7})
    (source,) = inspection.facts.sources
    assert (source.name, source.rows, source.rejected) == ("rows.jsonl", len(rows), len(rows))
    assert found(inspection, "no_rows").evidence.startswith(f"{len(rows)} of {len(rows)} rows")
    assert (inspection.facts.packs.packs, inspection.facts.packs.num_steps) == (0, 0)
    render_page(inspection)


def test_held_out_rows_are_shown_without_a_usable_training_row(inspected, tmp_path):
    held_out = write_rows(tmp_path / "eval.jsonl", [row("a", "b")])
    inspection = inspected(BROKEN, eval=[{"path": str(held_out)}])
    assert [(source.role, source.usable) for source in inspection.facts.sources] == [("train", 0), ("eval", 1)]
    assert [sample["id"] for sample in inspection.samples] == ["eval.jsonl:1"]


def test_sample_that_breaks_when_decoded_shows_its_fault(inspected, tmp_path):
    picture(256, 256, 0).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    inspection = inspected([row("a", "b"), row("c", "d", ["cut.jpg"])], entry={"name": "named"})
    finding = found(inspection, "undecodable")
    assert (finding.level, finding.rows, finding.evidence) == ("error", ["2"], "1 of 2 samples shown (50%)")
    _, broken = inspection.samples
    assert (broken["id"], broken["checks"]) == ("named:rows.jsonl:2", ["undecodable"])
    assert "image cut.jpg: is truncated or damaged" in broken["fault"]


def test_held_out_sets_of_one_name(inspected, tmp_path):
    file = write_rows(tmp_path / "eval.jsonl", [row("a", "b")])
    shutil.copy(file, tmp_path / "other.jsonl")
    evals = [{"path": str(tmp_path / name)} for name in ("eval.jsonl", "other.jsonl")]
    rows = [row("c", "d")]
    assert found(inspected(rows, eval=evals), "same_name") is None
    evals[1]["name"] = "eval"
    assert found(inspected(rows, eval=evals), "same_name").evidence == "2 of 2 data sets (100%)"


def test_reasons_that_differ_in_names_are_one_group(inspected):
    gone = [row("a", "b", [name]) for name in ("a.png", "my file.png", "file 3 of mine.png", "x/y.png")]
    (source,) = inspected([*gone, row("a", "b")]).facts.sources
    assert [(group.count, group.rows) for group in source.rejects] == [(4, list("1234"))]


def test_unpaired_surrogate_in_a_reason_can_be_printed(inspected):
    odd = row("a", "b")
    odd["messages"][0]["role"] = "\ud800"
    (source,) = inspected([odd, row("a", "b")]).facts.sources
    assert "unknown role '\\ud800';" in source.rejects[0].reason


def test_added_tokens_are_counted_with_their_names(tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_folder, tmp_path / "model")
    stock = AutoTokenizer.from_pretrained(tmp_path / "model")
    stock.add_tokens([f"<loc_{number}>" for number in range(10)])
    stock.save_pretrained(tmp_path / "model")
    new = "".join(f"<loc_{number}>" for number in range(10))
    rows = [row(f"<|box_start|>{new}", f"{new}<loc_3>"), row("<|box_end|>", "<|box_start|>"), row("plain", "text")]
    data = {
        "num_workers": 0,
        "max_tokens_per_pack": 512,
        "train": [{"path": str(write_rows(tmp_path / "a.jsonl", rows))}],
    }
    inspection = inspect_recipe(finding_rows_recipe(tmp_path / "model", tmp_path, data=data))
    noted, new_token = found(inspection, "added_token"), found(inspection, "new_token")
    assert (noted.level, noted.evidence) == ("note", "2 of 3 rows (66.7%); <|box_start|> 2, <|box_end|> 1")
    assert new_token.level == "warning"
    assert new_token.evidence.startswith("1 of 3 rows (33.3%); <loc_3> 3, <loc_0> 2, ")
    assert new_token.evidence.endswith("<loc_7> 2 and 2 more")
    assert inspection.facts.sources[0].added_tokens["<loc_9>"] == 2


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
