import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, Qwen3VLForConditionalGeneration

from qwen3vl_train.arch import Qwen3VLArch
from tests.helpers import oracles

ASSETS = tiny_checkpoint.ASSETS


@pytest.mark.parametrize("tie", [True, False])
def test_stock_transformers_finds_every_tensor_and_no_other(tmp_path: Path, tie: bool):
    config = tiny_checkpoint.write_tiny_checkpoint(tmp_path, tie_word_embeddings=tie)
    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tie
    assert model.config.text_config.rope_parameters["rope_theta"] == config["text_config"]["rope_theta"]
    assert model.config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]
    assert list(model.config.vision_config.deepstack_visual_indexes) == [0, 1, 2]


def test_config_agrees_with_our_reader_and_the_tokenizer(tiny_folder: Path):
    arch = Qwen3VLArch.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    markup = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    ids = [arch.image_token_id, arch.video_token_id, arch.vision_start_token_id, arch.vision_end_token_id]
    assert ids == tokenizer.convert_tokens_to_ids(markup)
    assert arch.text.vocab_size > len(tokenizer)
    sampling = GenerationConfig.from_pretrained(tiny_folder)
    assert sampling.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_fresh_weights_follow_the_seed(tmp_path: Path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 0), (again, 0), (other, 1)):
        tiny_checkpoint.write_tiny_checkpoint(folder, seed=seed)
    for file in sorted(path.name for path in first.iterdir()):
        assert (first / file).read_bytes() == (again / file).read_bytes(), file
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    for name, tensor in load_file(first / "model.safetensors").items():
        if tensor.ndim == 1:
            assert torch.all(tensor == (0 if name.endswith(".bias") else 1)), name
        else:
            assert 0.01 < tensor.std() < 0.2, name


def test_tokenizer_has_the_markup_of_qwen3_vl(tiny_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    ids = [tokenizer.convert_tokens_to_ids(token) for token, _ in tiny_checkpoint.ADDED_TOKENS]
    assert ids == list(range(ids[0], ids[0] + 26)), "the added tokens follow the trained ones, in their order"
    assert len(tokenizer) == ids[-1] + 1
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    text = "".join(token for token, _ in tiny_checkpoint.ADDED_TOKENS)
    assert tokenizer(text)["input_ids"] == ids
    kept = "".join(token for token, special in tiny_checkpoint.ADDED_TOKENS if not special)
    assert tokenizer.decode(ids, skip_special_tokens=True) == kept


def test_tokenizer_splits_as_qwen_does(tiny_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("12") == ["1", "2"], "each digit is a token"
    assert pieces("assistant\n") == ["assistant", "\n"]
    assert pieces("assistant\n\nodd, seven") == ["assistant", "\n\n", "odd", ",", " seven"]  # two newlines are one
    decomposed, composed, unseen = "Gro\u0308ße", "Größe", "\U0001f642\u05d0 \t数字"
    assert tokenizer(decomposed)["input_ids"] == tokenizer(composed)["input_ids"], "NFC"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen, "every byte has a token"


def test_tokenizer_file_alone_says_the_same(tiny_folder: Path):
    """transformers rebuilds parts of a Qwen2Tokenizer from its class; a reader of tokenizer.json alone must agree."""
    stock = AutoTokenizer.from_pretrained(tiny_folder)
    plain = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    markup = "".join(token for token, _ in tiny_checkpoint.ADDED_TOKENS)
    for text in (markup, "Gro\u0308ße  12\n\n\tit's", tiny_checkpoint.default_texts()[0], " <|im_start|> user"):
        ids = plain.encode(text).ids
        assert ids == stock(text)["input_ids"]
        for skip in (True, False):
            decoded = plain.decode(ids, skip_special_tokens=skip)
            assert decoded == stock.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_tokenizer_too_small_is_refused():
    with pytest.raises(ValueError, match="vocab_size: 281 is too small; bytes and added tokens alone need 282"):
        tiny_checkpoint.build_tokenizer(["text"], 281)
    assert tiny_checkpoint.build_tokenizer(["text"], 282).get_vocab_size() == 282


@pytest.mark.parametrize("template", ["instruct", "thinking"])
def test_chat_template_is_carried_unchanged_and_renders(tmp_path: Path, template: str):
    tiny_checkpoint.write_tiny_checkpoint(tmp_path, template=template)
    expected = (ASSETS / f"chat_template_{template}.jinja").read_text()
    assert json.loads((tmp_path / "chat_template.json").read_text()) == {"chat_template": expected}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == expected
    messages = oracles.conversations()["one_image"]["messages"]
    answer = {"instruct": "7", "thinking": "<think>\n\n</think>\n\n7"}[template]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which digit is this?<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def test_digit_costs_four_tokens(tiny_folder: Path):
    processor = AutoImageProcessor.from_pretrained(tiny_folder)
    out = processor(oracles.sample_images()["exact"], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert out["pixel_values"].shape == (16, 1536)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]


def test_command_writes_a_complete_checkpoint(tmp_path: Path):
    script = ASSETS.parent / "tiny_checkpoint.py"
    command = [sys.executable, script, "--out", tmp_path / "new" / "tiny"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "4 vision blocks, 4 decoder layers, 512 token rows, 6.2 MB" in done.stdout
    assert {file.name for file in (tmp_path / "new" / "tiny").iterdir()} == {
        "chat_template.json", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
    }  # fmt: skip


def test_oracle_logits_are_equal_with_two_attention_kernels(oracle_folder: Path):
    """Two attention kernels differ ten times less than the 2e-4 that separates a mistake in a model from noise."""
    model, other = oracles.oracle(oracle_folder), oracles.oracle(oracle_folder, attention="eager")
    for name, sample in oracles.conversations().items():
        inputs = oracles.oracle_inputs(oracle_folder, sample["messages"])
        with torch.no_grad():
            sdpa, eager = model(**inputs).logits, other(**inputs).logits
        assert 1 < sdpa.std() < 2, name
        torch.testing.assert_close(sdpa, eager, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_oracle_shows_small_mistakes(oracle_folder: Path):
    """The smallest known mistake, LayerNorm's usual epsilon in the vision tower, is five times the tolerance."""
    model = oracles.oracle(oracle_folder)
    inputs = oracles.oracle_inputs(oracle_folder, oracles.conversations()["one_image"]["messages"])
    with torch.no_grad():
        right = model(**inputs).logits
        for module in model.model.visual.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        wrong = model(**inputs).logits
    assert (right - wrong).abs().max() > 1e-3


def test_oracle_dialects_differ_in_config_only(make_oracle: Callable[..., Path]):
    published = make_oracle(vision_depth=24, tie=True, dialect="published")
    saved = make_oracle(vision_depth=24, tie=True, dialect="saved")
    texts = [json.loads((folder / "config.json").read_text())["text_config"] for folder in (published, saved)]
    assert "rope_scaling" in texts[0]
    assert ["rope_parameters" in text for text in texts] == [False, True]
    assert (published / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert Qwen3VLArch.from_pretrained(published) == Qwen3VLArch.from_pretrained(saved)


@pytest.mark.parametrize("name", oracles.sample_images())
def test_oracle_pixels_are_near_those_of_the_pillow_processor(tiny_folder: Path, name: str):
    """Pillow's bicubic rounds differently: up to 12 of 255 levels where one side grows and the other shrinks."""
    image = oracles.sample_images()[name]
    expected = AutoImageProcessor.from_pretrained(tiny_folder)(image, return_tensors="pt")
    pixels, grid = oracles.oracle_pixels(tiny_folder, image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    difference = (pixels - expected["pixel_values"]).abs()
    assert difference.max() < 0.1
    assert difference.mean() < 3e-3
