import json

import pytest
import tiny_checkpoint

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.encode.processor import (
    ImageLimits,
    override_clip_rules,
    override_image_limits,
    read_clip_rules,
    read_image_limits,
)
from qwen3vl_train.data.media.clips import ClipRules
from tests.helpers.messages import message_of


@pytest.fixture
def folder(tmp_path, tiny_folder):
    tokenizer = tiny_checkpoint.build_tokenizer(["x"], 300)
    tiny_checkpoint.write_processor_files(tmp_path, tokenizer, min_pixels=65536, max_pixels=16777216)
    return tmp_path


@pytest.fixture(scope="module")
def arch(tiny_folder):
    return Qwen3VLArch.from_pretrained(tiny_folder)


def edit(folder, name="preprocessor_config.json", **changes):
    file = folder / name
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def test_published_file(folder, arch):
    assert read_image_limits(folder, arch) == (65536, 16777216)
    edit(folder, size=None, min_pixels=1024, max_pixels=4096)
    assert read_image_limits(folder, arch) == (1024, 4096)


def test_processor_config_takes_precedence(folder, arch):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 2048, "longest_edge": 8192}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert read_image_limits(folder, arch) == (2048, 8192)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    assert read_image_limits(folder, arch) == (65536, 16777216)


FAULTS = [
    ({"patch_size": 14}, "patch_size is 14 here and 16 in config.json, Qwen3-VL has 16"),
    ({"patch_size": None}, "patch_size is None here and 16 in config.json, Qwen3-VL has 16"),
    ({"merge_size": 4}, "merge_size is 4 here and 2 in config.json, Qwen3-VL has 2"),
    ({"temporal_patch_size": 1}, "temporal_patch_size is 1 here and 2 in config.json, Qwen3-VL has 2"),
    ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is [0.48, 0.46, 0.41], Qwen3-VL has [0.5, 0.5, 0.5]"),
    ({"image_std": None}, "image_std is None, Qwen3-VL has [0.5, 0.5, 0.5]"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0, Qwen3-VL has 1/255"),
    ({"resample": 2}, "resample is 2, Qwen3-VL has 3 (bicubic)"),
    ({"do_rescale": False}, "do_rescale is false, Qwen3-VL has true"),
    ({"size": {"height": 5}}, "size is {'height': 5}, not {'shortest_edge': pixels, 'longest_edge': more pixels}"),
    ({"size": {"shortest_edge": 9, "longest_edge": 5}},
     "size is {'shortest_edge': 9, 'longest_edge': 5}, not {'shortest_edge': pixels, 'longest_edge': more pixels}"),
    ({"patch_size": 14, "resample": 2},
     "patch_size is 14 here and 16 in config.json, Qwen3-VL has 16; resample is 2, Qwen3-VL has 3 (bicubic)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "fault"), FAULTS, ids=lambda value: str(value)[:40])
def test_other_settings_are_refused(folder, arch, changes, fault):
    fault = f"{edit(folder, **changes)}: {fault}; use the preprocessor file of this checkpoint"
    assert message_of(ValueError, read_image_limits, folder, arch) == fault


def test_missing_and_broken_files(folder, arch):
    file = folder / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: not JSON \(.*\); copy the file again"):
        read_image_limits(folder, arch)
    file.unlink()
    assert message_of(ValueError, read_image_limits, folder, arch) == (
        f"{folder}: no preprocessor_config.json or processor_config.json; copy it from the checkpoint"
    )


def test_budgets_count_tokens_of_32_by_32():
    limits = ImageLimits(65536, 16777216)
    assert override_image_limits(limits, None, None) == limits
    assert override_image_limits(limits, None, 1280) == (65536, 1280 * 1024)
    assert override_image_limits(limits, 256, 1280) == (256 * 1024, 1280 * 1024)
    assert override_image_limits(limits, None, 16) == (16 * 1024, 16 * 1024)  # below the checkpoint's minimum of 64
    assert override_image_limits(limits, 20000, None) == (20000 * 1024, 20000 * 1024)


def test_impossible_budgets():
    for given, fault in (
        ((100, 50), "data.min_visual_tokens_per_image: got 100, more than the maximum of 50; lower it"),
        ((None, 0), "data.max_visual_tokens_per_image: got 0; use at least 1"),
    ):
        assert message_of(ValueError, override_image_limits, ImageLimits(65536, 16777216), *given) == fault


CLIPS = "video_preprocessor_config.json"


def test_rules_of_clips(folder, arch):
    assert read_clip_rules(folder, arch) == ClipRules(2.0, 4, 768, 65536, 4 * 16777216)  # as published: no sampling
    edit(folder, CLIPS, fps=1, min_frames=2, max_frames=16, size={"shortest_edge": 4096, "longest_edge": 25165824})
    assert read_clip_rules(folder, arch) == ClipRules(1.0, 2, 16, 4096, 25165824)
    settings = json.loads((folder / CLIPS).read_text()) | {"max_frames": 32}
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": settings}))
    assert read_clip_rules(folder, arch).max_frames == 32
    (folder / "processor_config.json").unlink()
    (folder / CLIPS).unlink()
    assert read_clip_rules(folder, arch) is None


CLIP_FAULTS = [
    ({"temporal_patch_size": 1}, "temporal_patch_size is 1 here and 2 in config.json, Qwen3-VL has 2"),
    ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is [0.48, 0.46, 0.41], Qwen3-VL has [0.5, 0.5, 0.5]"),
    ({"cap_pixels_per_frame": True},
     "cap_pixels_per_frame is true, Qwen3-VL was trained with the limit of the whole clip alone"),
    ({"fps": -1}, "fps, min_frames, max_frames are -1, 4, 768, Qwen3-VL has 2, 4, 768"),
    ({"min_frames": 1}, "fps, min_frames, max_frames are 2, 1, 768, Qwen3-VL has 2, 4, 768"),
    ({"max_frames": 3}, "fps, min_frames, max_frames are 2, 4, 3, Qwen3-VL has 2, 4, 768"),
    ({"max_frames": "many"}, "fps, min_frames, max_frames are 2, 4, 'many', Qwen3-VL has 2, 4, 768"),
    ({"size": None}, "size is None, not {'shortest_edge': pixels, 'longest_edge': more pixels}"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "fault"), CLIP_FAULTS, ids=lambda value: str(value)[:40])
def test_other_settings_of_clips_are_refused(folder, arch, changes, fault):
    fault = f"{edit(folder, CLIPS, **changes)}: {fault}; use the video preprocessor file of this checkpoint"
    assert message_of(ValueError, read_clip_rules, folder, arch) == fault


def test_recipe_overrides_the_rules_of_the_checkpoint():
    rules = ClipRules(2.0, 4, 768, 4096, 25165824)
    assert override_clip_rules(rules, None, None, None, None) == rules
    assert override_clip_rules(rules, 0.5, 8, 64, 100) == (0.5, 8, 64, 4096, 100 * 2 * 32 * 32)
    assert override_clip_rules(rules, None, None, 3, None) == rules._replace(min_frames=3, max_frames=3)
    assert override_clip_rules(rules, None, 1000, None, None) == rules._replace(min_frames=1000, max_frames=1000)
    assert override_clip_rules(rules, None, None, None, 1) == rules._replace(min_pixels=2048, max_pixels=2048)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ((0.0, None, None, None), "data.fps: got 0.0; use a number from 0.0001 to 1000"),
        ((float("nan"), None, None, None), "data.fps: got nan; use a number from 0.0001 to 1000"),
        ((None, 1, None, None), "data.min_frames: got 1; use at least 2"),
        ((None, None, 0, None), "data.max_frames: got 0; use at least 2"),
        ((None, 9, 8, None), "data.min_frames: got 9, more than data.max_frames 8; lower it"),
        ((None, None, None, 0), "data.max_visual_tokens_per_video: got 0; use at least 1"),
    ],
)
def test_impossible_rules(given, fault):
    assert message_of(ValueError, override_clip_rules, ClipRules(2.0, 4, 768, 4096, 25165824), *given) == fault
