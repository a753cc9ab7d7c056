"""What `--json` lists of samples and rejects is what reaches the model, and can be compared by a script."""

import hashlib
import json

import pytest

from qwen3vl_train.data.media.image import load_rgb, resize_to_patches
from qwen3vl_train.data.rows.parse import parse_sample
from qwen3vl_train.inspect.as_json import describe_sample
from qwen3vl_train.inspect.recipe import inspect_recipe
from qwen3vl_train.inspect.samples import view_tokens
from tests.helpers import finding_rows as rows
from tests.helpers.clip_files import write_clip
from tests.helpers.finding_rows import finding_rows_recipe
from tests.helpers.small_runs import picture, row, write_rows

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def listed(inspection):
    return inspection.to_json()


def described(collate, parts, answer="both"):
    raw = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
    sample, encoded = parse_sample(raw), collate.encode(raw)
    return describe_sample(sample, encoded, view_tokens(encoded, collate.tokenizer)["texts"], collate)


def test_a_sample_has_its_text_its_trained_spans_and_its_pixels(listed, data_folder):
    sample = listed["samples"][rows.PLAIN - 1]
    patches = resize_to_patches(load_rgb(str(data_folder / "wide.png")), (4, 8))
    assert sample == {
        "id": "train.jsonl:1",
        "source": "train.jsonl",
        "row": "1",
        "fault": None,
        "text": f"<|im_start|>user\n{MARK}What is this?<|im_end|>\n<|im_start|>assistant\na plain answer<|im_end|>\n",
        "trained": ["a plain answer<|im_end|>"],
        "media": [
            {
                "kind": "image",
                "width": 128,
                "height": 64,
                "times": [],
                "pixels_sha256": hashlib.sha256(patches.numpy().tobytes()).hexdigest(),
            }
        ],
    }


def test_trained_spans_are_in_order_and_without_untrained_turns(listed):
    assert listed["samples"][rows.WEIGHTED - 1]["trained"] == ["first answer<|im_end|>", "heavy answer ü数😀<|im_end|>"]


def test_a_clip_has_the_times_that_its_text_holds(collate, tmp_path):
    parts = [{"type": "video", "video": str(write_clip(tmp_path / "clip.mp4", 24))}, {"type": "text", "text": "What?"}]
    found = described(collate, parts)
    (clip,) = found["media"]
    assert found["text"].count(CLIP) == 1
    # Frames 0, 8, 15 and 23 of 12 a second are sampled, and each pair has its mean time.
    assert (clip["kind"], clip["times"]) == ("video", pytest.approx([(0 + 8) / 24, (15 + 23) / 24]))


def test_an_image_has_one_hash_with_and_without_a_clip(collate, tmp_path):
    still = {"type": "image", "image": picture(64, 64, 0)}
    clip = {"type": "video", "video": str(write_clip(tmp_path / "clip.mp4", 24))}
    other = {"type": "image", "image": picture(64, 64, 1)}
    both = described(collate, [clip, still])["media"]
    assert both == described(collate, [clip])["media"] + described(collate, [still])["media"]
    assert both[1]["pixels_sha256"] != described(collate, [other])["media"][0]["pixels_sha256"]


def test_rejects_have_kind_and_words(listed):
    assert [(one["id"], one["row"], one["kind"]) for one in listed["rejects"]] == [
        ("train.jsonl:16", "16", "missing_file"),
        ("train.jsonl:17", "17", "missing_file"),
        ("train.jsonl:18", "18", "invalid_json"),
        ("train.jsonl:19", "19", "nothing_to_learn"),
    ]
    assert "missing.png: no such file" in listed["rejects"][0]["words"]
    assert {one["source"] for one in listed["rejects"]} == {"train.jsonl"}


def test_a_sample_that_breaks_has_its_fault(tiny_folder, tmp_path):
    picture(64, 64, 0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    write_rows(tmp_path / "train.jsonl", [row("What?", "half", ["cut.png"])])
    data = {"train": [{"path": str(tmp_path / "train.jsonl")}], "num_workers": 0}
    (sample,) = inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data)).to_json()["samples"]
    assert "cut.png" in sample["fault"]
    assert (sample["text"], sample["trained"], sample["media"]) == (None, None, None)


def test_half_a_character_in_a_row_is_written_as_its_escape(tiny_folder, tmp_path):
    write_rows(tmp_path / "train.jsonl", [row("What?", "whole"), '{"messages": [{"role": "user", "\\ud800": 1}]}'])
    data = {"train": [{"path": str(tmp_path / "train.jsonl")}], "num_workers": 0}
    found = inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data)).to_json()
    assert json.dumps(found, ensure_ascii=False).encode()
    assert len(found["rejects"]) == 1
