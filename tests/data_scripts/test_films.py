"""The headers and rows of the films are right, and the example recipe learns from them."""

import subprocess
import sys
from pathlib import Path

import films
import pytest
import torch

from qwen3vl_train.config import load_recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.media.frames import read_frames
from qwen3vl_train.data.media.video import VideoHeader, read_header
from qwen3vl_train.data.sources import open_sources
from qwen3vl_train.train.loop import train
from tests.helpers import clip_files
from tests.helpers.small_runs import losses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    assert films.write_films(folder) == 3 + 11 + 21 + 8 + 1
    return folder


def recipe_of(model: Path, folder: Path, out: Path):
    changes = [f"data.train.0.path={folder / 'films.jsonl'}", f"model.path={model}", f"output_dir={out}"]
    return load_recipe(ROOT / "recipes" / "films-clips.yaml", [*changes, "data.num_workers=0"])


def test_second_run_writes_nothing(folder):
    command = [sys.executable, films.__file__, "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder}: complete, nothing to do\n"


HEADERS = {
    "bigbuckbunny": VideoHeader(132, 25.0, 720, 1280, 0),
    "bikes": VideoHeader(250, 25.0, 272, 640, 0),
    "carphone_pristine": VideoHeader(120, 30000 / 1001, 144, 176, 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_real_files(folder, name):
    path = folder / f"{name}.mp4"
    header = read_header(str(path))
    assert header == HEADERS[name]
    wanted = [1, 50, 51, header.num_frames - 1]
    frames = clip_files.decode(path)[wanted]
    found = dict(read_frames(str(path), wanted, header))
    assert all(torch.equal(found[index], frame) for index, frame in zip(wanted, frames, strict=True))


def test_rows(folder, tiny_folder, tmp_path):
    (source,) = open_sources(recipe_of(tiny_folder, folder, tmp_path).data.train[0])
    assert len(source) == 3 + (11 - 3) + (21 - 3) + (8 - 3)
    collate = MultimodalCollator.from_pretrained(tiny_folder, fps=1, max_visual_tokens_per_video=8)
    texts = []
    for number in (0, 2):
        encoded = collate.encode(source.sample(number))
        text = collate.decode(encoded.input_ids.tolist(), skip_special_tokens=False)
        texts.append(text.replace("<|video_pad|>", "").replace("<|vision_start|><|vision_end|>", "#"))
    whole = "<0.7 seconds>#<3.3 seconds>#<5.2 seconds>#"  # frames 0, 33, 66, 98, 131 of 25 a second; the last twice
    four_frames = "<0.7 seconds>#<1.7 seconds>#"
    for clip, text in zip((whole, four_frames), texts, strict=True):
        assert text == (
            f"<|im_start|>user\n{clip}What does this clip show?<|im_end|>\n"
            "<|im_start|>assistant\nA grey rabbit in a cartoon.<|im_end|>\n"
        )


def test_recipe_learns(folder, tiny_folder, tmp_path):
    train(recipe_of(tiny_folder, folder, tmp_path))
    found = losses(tmp_path / "films-clips")
    assert len(found) == 40
    assert sum(found[-3:]) / 3 < 0.5 * found[0]
