"""The files beside the weights of an export: what was used, in a form that transformers 4.57 and 5 both open."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.checkpoint.companions import copy_companions, write_card

LIMITS = (4096, 65536)
SIZE = {"shortest_edge": 4096, "longest_edge": 65536}
CLIPS = {"size": {"shortest_edge": 2048, "longest_edge": 99 * 2048}, "fps": 1.0, "min_frames": 4, "max_frames": 64}


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


@pytest.fixture
def source(tiny_folder, tmp_path):
    """A base in the published form, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "source"))


@pytest.fixture
def resaved(source):
    """The same base as transformers 5 saves it: its tokenizer files, one processor_config.json."""
    from transformers import AutoTokenizer

    image, video = read(source / "preprocessor_config.json"), read(source / "video_preprocessor_config.json")
    template = read(source / "chat_template.json")["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in ("tokenizer", "tokenizer_config", "chat_template", "preprocessor_config", "video_preprocessor_config"):
        (source / f"{name}.json").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(source)
    image |= {"image_processor_type": "Qwen2VLImageProcessorPil", "crop_size": None}
    sections = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    write(source / "processor_config.json", sections)
    return source


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_files_are_copied_with_the_pixel_limits_that_were_used(source, out):
    write(source / "processor_config.json", {"image_processor": {"size": {}, "max_pixels": 7}})
    (source / "secret.txt").write_text("not ours to copy")
    copy_companions(source, out, pixel_limits=LIMITS)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    limits = {"size": SIZE, "min_pixels": 4096, "max_pixels": 65536}  # the slow processor of 4.57 reads no size
    assert read(out / "preprocessor_config.json") == {**read(source / "preprocessor_config.json"), **limits}
    assert read(out / "processor_config.json")["image_processor"] == limits
    assert not (out / "secret.txt").exists()


def test_the_settings_of_clips_that_were_used(source, out):
    write(source / "processor_config.json", {"image_processor": {"a": 1}, "video_processor": {"b": 2}})
    copy_companions(source, out, clip_settings=CLIPS)
    before = read(source / "video_preprocessor_config.json")
    assert before["size"] != CLIPS["size"]
    assert read(out / "video_preprocessor_config.json") == {**before, **CLIPS}
    both = read(out / "processor_config.json")
    assert both == {"image_processor": {"a": 1}, "video_processor": {"b": 2, **CLIPS}}
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()


def test_processors_saved_by_transformers_5_have_files_of_their_own(resaved, tiny_folder, out):
    copy_companions(resaved, out, pixel_limits=LIMITS, clip_settings=CLIPS)
    published = read(tiny_folder / "preprocessor_config.json")
    limits = {"size": SIZE, "min_pixels": 4096, "max_pixels": 65536}
    assert read(out / "preprocessor_config.json") == {**published, **limits}
    assert read(out / "video_preprocessor_config.json") == {
        **read(tiny_folder / "video_preprocessor_config.json"),
        **CLIPS,
    }
    both = read(out / "processor_config.json")
    assert both["image_processor"]["size"] == SIZE
    assert both["video_processor"]["size"] == CLIPS["size"]


def test_a_tokenizer_saved_by_transformers_5_is_one_of_4_57(resaved, tiny_folder, out):
    from transformers import AutoTokenizer

    saved = read(resaved / "tokenizer_config.json")
    assert isinstance(saved["extra_special_tokens"], list)  # which 4.57 cannot read
    copy_companions(resaved, out, template="{{ 1 }}")
    config = read(out / "tokenizer_config.json")
    names = read(tiny_folder / "tokenizer_config.json")["additional_special_tokens"]
    assert config["additional_special_tokens"] == names
    assert (config["tokenizer_class"], config["chat_template"]) == ("Qwen2Tokenizer", "{{ 1 }}")
    assert not config.keys() & {"extra_special_tokens", "backend", "is_local", "local_files_only"}
    text = "a<|box_start|>b<|im_end|> <think>"
    theirs = AutoTokenizer.from_pretrained(tiny_folder).encode(text)
    assert AutoTokenizer.from_pretrained(out).encode(text) == theirs


def test_the_template_is_wherever_a_version_looks_for_it(source, out):
    copy_companions(source, out, template="{{ 'é' }}")
    assert (out / "chat_template.jinja").read_text() == "{{ 'é' }}"
    assert read(out / "chat_template.json") == {"chat_template": "{{ 'é' }}"}
    assert read(out / "tokenizer_config.json")["chat_template"] == "{{ 'é' }}"


def test_templates_by_name_are_kept(source, out):
    named = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]
    write(source / "tokenizer_config.json", {"chat_template": named})
    copy_companions(source, out, template="d")
    assert read(out / "tokenizer_config.json") == {"chat_template": named}


def test_the_card_links_to_the_base_on_the_hub(tmp_path):
    write_card(tmp_path, name="mine", base="Qwen/Q", hub_id="Qwen/Q", is_adapter=True)
    assert (tmp_path / "README.md").read_text() == (
        "---\nbase_model: Qwen/Q\nlibrary_name: peft\npipeline_tag: image-text-to-text\n---\n\n"
        "# mine\n\nQwen3-VL, LoRA adapter of `Qwen/Q` with qwen3vl_train.\n"
    )
    write_card(tmp_path, name="mine", base="/models/q", hub_id=None, is_adapter=False)
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card
    assert "library_name: transformers" in card
    assert "fine-tuned from `/models/q` with" in card


def test_code_of_the_base_does_not_travel(source, out):
    code = {"AutoProcessor": "evil.Processor"}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        write(source / name, {**read(source / name), "auto_map": code, "nested": {"auto_map": code, "kept": 1}})
    copy_companions(source, out)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        assert "auto_map" not in (out / name).read_text()
        assert read(out / name)["nested"] == {"kept": 1}
