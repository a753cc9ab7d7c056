import json

import pytest
import tiny_checkpoint

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.data.processor import ImageLimits, budget, read_image_limits


@pytest.fixture
def folder(tmp_path, tiny_folder):
    tokenizer = tiny_checkpoint.build_tokenizer(["x"], 300)
    tiny_checkpoint.write_processor_files(tmp_path, tokenizer, min_pixels=65536, max_pixels=16777216)
    return tmp_path


@pytest.fixture(scope="module")
def arch(tiny_folder):
    return Qwen3VLArch.from_pretrained(tiny_folder)


def edit(folder, **changes):
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def test_published_file(folder, arch):
    assert read_image_limits(folder, arch) == (65536, 16777216)
    edit(folder, size=None, min_pixels=1024, max_pixels=4096)
    assert read_image_limits(folder, arch) == (1024, 4096)


def test_the_file_of_transformers_5_goes_first(folder, arch):
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
    file = edit(folder, **changes)
    with pytest.raises(ValueError) as caught:
        read_image_limits(folder, arch)
    assert str(caught.value) == f"{file}: {fault}; use the preprocessor file of this checkpoint"


def test_missing_and_broken_files(folder, arch):
    file = folder / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: not JSON \(.*\); copy the file again"):
        read_image_limits(folder, arch)
    file.unlink()
    with pytest.raises(ValueError) as caught:
        read_image_limits(folder, arch)
    assert str(caught.value) == (
        f"{folder}: no preprocessor_config.json or processor_config.json; copy it from the checkpoint"
    )


def test_budgets_count_tokens_of_32_by_32():
    limits = ImageLimits(65536, 16777216)
    assert budget(limits, None, None) == limits
    assert budget(limits, None, 1280) == (65536, 1280 * 1024)
    assert budget(limits, 256, 1280) == (256 * 1024, 1280 * 1024)
    assert budget(limits, None, 16) == (16 * 1024, 16 * 1024)  # below the checkpoint's minimum of 64
    assert budget(limits, 20000, None) == (20000 * 1024, 20000 * 1024)


def test_impossible_budgets():
    limits = ImageLimits(65536, 16777216)
    with pytest.raises(ValueError) as caught:
        budget(limits, 100, 50)
    assert str(caught.value) == "data.min_visual_tokens_per_image: got 100, more than the maximum of 50; lower it"
    with pytest.raises(ValueError) as caught:
        budget(limits, None, 0)
    assert str(caught.value) == "data.max_visual_tokens_per_image: got 0; use at least 1"
