"""The rows of the photos are right, and the example recipes learn from them."""

import json
import subprocess
import sys
from pathlib import Path

import photos
import pytest
from PIL import Image

from qwen3vl_train.config import load_recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.sources import open_sources
from qwen3vl_train.train.loop import train
from tests.helpers.small_runs import losses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    assert photos.write_photos(folder) == 2 * photos.NUM_CROPS + 2
    return folder


def recipe_of(name: str, model: Path, folder: Path, out: Path, *more: str):
    path = {"photos-llava": "llava.json", "photos-grounding": "grounding.jsonl"}[name]
    changes = [f"data.train.0.path={folder / path}", f"model.path={model}", f"output_dir={out}", "data.num_workers=0"]
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [*changes, *more])


def test_second_run_writes_nothing(folder):
    command = [sys.executable, photos.__file__, "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder}: complete, nothing to do\n"


def test_llava_rows(folder, tiny_folder, tmp_path):
    (source,) = open_sources(recipe_of("photos-llava", tiny_folder, folder, tmp_path).data.train[0])
    assert len(source) == 2 * photos.NUM_CROPS
    collate = MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=4)
    encoded = collate.encode(source.sample(0))
    text = collate.decode(encoded.input_ids.tolist(), skip_special_tokens=False)
    assert text.replace("<|image_pad|>", "") == (
        "<|im_start|>user\n<|vision_start|><|vision_end|>What is in this photo?<|im_end|>\n"
        "<|im_start|>assistant\nA pagoda of several storeys by a lake.<|im_end|>\n"
        "<|im_start|>user\nWhat lies behind it?<|im_end|>\n<|im_start|>assistant\nA lake.<|im_end|>\n"
    )


def test_boxes_of_crops_show_the_same_thing(folder, tiny_folder, tmp_path):
    """Each box, read back from the text that the model learns, cuts the same image from the crop as from the photo."""
    (source,) = open_sources(recipe_of("photos-grounding", tiny_folder, folder, tmp_path).data.train[0])
    assert len(source) == 4 * photos.NUM_CROPS
    seen = {}
    for row in range(len(source)):
        sample = source.sample(row)
        image, answer = sample.messages[0].content[0].image, json.loads(sample.messages[1].text)[0]
        if "bbox_2d" not in answer:
            continue
        with Image.open(folder / image) as crop:
            width, height = crop.size
            x1, y1, x2, y2 = answer["bbox_2d"]
            cut = crop.crop((x1 * width // 1000, y1 * height // 1000, x2 * width // 1000, y2 * height // 1000))
            shown = list(cut.convert("L").resize((8, 8), Image.Resampling.BOX).tobytes())
        expected = seen.setdefault(answer["label"], shown)
        # Mean levels of an 8x8 grid: rounding to a thousandth moves an edge by half a pixel, JPEG adds a level or two.
        assert max(abs(a - b) for a, b in zip(shown, expected, strict=True)) < 12
    assert set(seen) == {"pagoda", "flower"}


@pytest.mark.parametrize("name", ["photos-llava", "photos-grounding"])
def test_recipe_learns(name, folder, tiny_folder, tmp_path):
    recipe = recipe_of(name, tiny_folder, folder, tmp_path, "train.num_steps=12")
    train(recipe)
    found = losses(tmp_path / name)
    # The first 12 of 40 steps: seen to fall from 6.9 to 1.3 (llava) and 2.4 (grounding).
    assert len(found) == 12
    assert sum(found[-3:]) / 3 < 0.6 * found[0]
