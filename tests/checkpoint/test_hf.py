"""Weights in Hugging Face form: read from every layout of a folder, refused with a reason, written so that stock
transformers reads them back.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_train import MultimodalCollator, load_qwen3_vl_model
from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.atomic import atomic_folder
from qwen3vl_train.checkpoint.companions import copy_companions
from qwen3vl_train.checkpoint.hf import write_huggingface
from qwen3vl_train.model.hf_names import from_huggingface
from tests.helpers import oracles
from tests.helpers.messages import message_of


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def rewrite(folder: Path, change: Any) -> None:
    """Read the one safetensors file, let `change` work on the dict, write it back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, parts: int) -> None:
    """Cut the one file into several with an index, as large checkpoints come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        members = {name: tensors[name] for name in sorted(tensors)[part::parts]}
        save_file(members, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    return message_of(ValueError, load_qwen3_vl_model, folder)


def expect_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    loaded = dict(model.named_parameters())
    assert set(loaded) == {from_huggingface(name) for name in tensors}
    assert all(torch.equal(loaded[str(from_huggingface(name))], tensor) for name, tensor in tensors.items())
    assert all(parameter.requires_grad for parameter in loaded.values())


# Reading


def test_many_files(folder):
    tensors = load_file(folder / "model.safetensors")
    shard(folder, 3)
    expect_weights(folder, tensors)


OLDER = [[("model.visual.", "visual."), ("model.language_model.", "model.")], [("model.visual.", "visual.")]]


@pytest.mark.parametrize("spelling", OLDER, ids=["towers on top", "vision on top"])
def test_older_spellings(folder, spelling):
    tensors = load_file(folder / "model.safetensors")

    def respell(stored):
        for name in list(stored):
            old = next((name.replace(new, old, 1) for new, old in spelling if name.startswith(new)), name)
            stored[old] = stored.pop(name)
        assert set(stored) != set(tensors)

    rewrite(folder, respell)
    expect_weights(folder, tensors)


def test_dtype_and_device(folder):
    model = load_qwen3_vl_model(folder)
    stored = load_file(folder / "model.safetensors")["model.language_model.norm.weight"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.language_model.model.norm.weight, stored.bfloat16())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_config_handed_in_is_used_instead_of_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    by_dict = load_qwen3_vl_model(folder, config, dtype=torch.float32)
    by_arch = load_qwen3_vl_model(folder, Qwen3VLArch.from_dict(config), dtype=torch.float32)
    assert by_dict.arch == by_arch.arch


def test_a_tied_head_that_is_stored_all_the_same(folder):
    embedding = "model.language_model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][3, 4].add_(0.5))
    assert refusal(folder) == (
        f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from embed_tokens.weight; "
        "set tie_word_embeddings to false in config.json if the head was trained apart"
    )
    edit_config(folder, lambda config: config.update(tie_word_embeddings=False))
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    assert model.language_model.lm_head.weight[3, 4] != model.language_model.model.embed_tokens.weight[3, 4]


# Refusing


def test_missing_extra_and_misshapen_weights_are_all_named(folder):
    def damage(tensors):
        del tensors["model.language_model.norm.weight"]
        for number in range(6):
            tensors[f"model.visual.extra.{number}"] = torch.zeros(1)
        tensors["model.visual.merger.norm.weight"] = torch.zeros(3)
        tensors["lm_head.bias"] = torch.zeros(1)

    rewrite(folder, damage)
    extra = ["lm_head.bias", *(f"model.visual.extra.{number}" for number in range(4))]
    assert refusal(folder).splitlines() == [
        f"{folder}: weights do not fit config.json",
        "  - 1 missing weight: model.language_model.norm.weight",
        f"  - 7 unexpected weights: {', '.join(extra)} and 2 more",
        "  - 1 wrong shape: model.visual.merger.norm.weight is (3,), config.json makes it (64,)",
    ]


def test_an_untied_head_must_be_stored(folder):
    edit_config(folder, lambda config: config.update(tie_word_embeddings=False))
    assert refusal(folder) == (
        f"{folder}: no lm_head.weight, and config.json does not tie it to the embedding: a model for embeddings has no "
        "head to write text with; take an Instruct or Thinking checkpoint, or set tie_word_embeddings to true in "
        "config.json if they were tied"
    )


def test_weights_in_a_pickle_are_named_and_not_opened(folder):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (folder / name).write_bytes(b"not even a pickle")
    assert refusal(folder) == (
        f"{folder}: weights are in pytorch_model-00001-of-00002.bin, a pickle, which is not opened; convert them where "
        "you trust the file: AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(new_folder)"
    )


def test_names_of_another_model(folder):
    rewrite(folder, lambda tensors: tensors.update({"transformer.h.0.weight": torch.zeros(1)}))
    assert refusal(folder) == (f"{folder}: 1 unexpected weight: transformer.h.0.weight; not a Qwen3-VL checkpoint?")


def test_a_weight_stored_twice(folder):
    rewrite(folder, lambda tensors: tensors.update({"visual.merger.norm.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"visual\.merger\.norm\.bias is stored twice, also as .*visual\.merger\.norm"):
        load_qwen3_vl_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1], ids=["empty", "no header", "half a header", "a byte short"])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(folder)
    assert message.startswith(f"{file}: not a complete safetensors file ({file.stat().st_size} bytes; ")
    assert message.endswith("); download it again")


@pytest.mark.parametrize("lost", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_missing_file_is_named(folder, lost):
    if lost != "model.safetensors":
        shard(folder, 3)
    (folder / lost).unlink()
    assert refusal(folder) == f"{folder}: missing {lost}; give a folder with all safetensors files"


@pytest.mark.parametrize(
    ("model_type", "fault"),
    [
        ("qwen2_5_vl", "'qwen2_5_vl', not 'qwen3_vl'; give the folder of a Qwen3-VL checkpoint"),
        ("qwen3_vl_moe", "qwen3_vl_moe; mixture-of-experts is not supported, use a dense one"),
    ],
)
def test_other_architectures(folder, model_type, fault):
    edit_config(folder, lambda config: config.update(model_type=model_type))
    assert refusal(folder) == f"{folder}/config.json: model_type is {fault}"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_not_an_index(folder, text):
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(folder).startswith(f"{index}: not a safetensors index (")


# Writing


def save(weights: dict, out: Path, **settings: Any) -> None:
    with atomic_folder(out) as folder:
        write_huggingface(weights.items(), {name: tuple(w.shape) for name, w in weights.items()}, folder, **settings)
        copy_companions(settings["source"], folder)


def changed_model(folder: Path) -> Any:
    model = load_qwen3_vl_model(folder, dtype=torch.float32)
    oracles.randomise(model, seed=5)
    return model


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 10**6], ids=["one file", "many files"])
def test_transformers_reads_what_we_write(oracle_folder, tmp_path, max_shard_bytes):
    from transformers import Qwen3VLForConditionalGeneration

    model, out = changed_model(oracle_folder), tmp_path / "deep" / "out"
    weights = dict(model.named_parameters())
    save(weights, out, source=oracle_folder, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in out.glob("*.safetensors*"))
    if max_shard_bytes == 10**6:
        assert len(files) > 3
        assert files[-1] == "model.safetensors.index.json"
        index = json.loads((out / files[-1]).read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in weights.values())
        assert set(index["weight_map"].values()) == set(files[:-1])
        sizes = [(out / name).stat().st_size for name in files[:-1]]
        assert max(sizes) < 10**6 + 20_000  # the header
    else:
        assert files == ["model.safetensors"]
    stock, info = Qwen3VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    messages = oracles.conversations()["one_image"]["messages"]
    with torch.no_grad():
        theirs = stock.eval()(**oracles.oracle_inputs(out, messages), use_cache=False).logits[0]
    mine = model.logits(MultimodalCollator.from_pretrained(out)([{"messages": messages}]))
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)  # as against transformers elsewhere
    again = load_qwen3_vl_model(out, dtype=torch.float32)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())


def test_config_is_written_in_the_published_dialect(make_oracle, tmp_path):
    source, out = make_oracle(vision_depth=27, tie=False, dialect="saved"), tmp_path / "out"
    assert "rope_parameters" in json.loads((source / "config.json").read_text())["text_config"]
    model = load_qwen3_vl_model(source, dtype=torch.float32)
    save(dict(model.named_parameters()), out, source=source, dtype=torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config["text_config"]["rope_theta"] == 1_000_000
    assert set(config["text_config"]["rope_scaling"]) == {"mrope_interleaved", "mrope_section", "rope_type"}
    assert config["vision_config"]["model_type"] == "qwen3_vl"
    assert not any("rope_parameters" in config[section] for section in ("text_config", "vision_config"))
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert Qwen3VLArch.from_pretrained(out) == model.arch


def test_nothing_is_left_where_writing_fails(folder, tmp_path):
    out = tmp_path / "out"
    weights = {"visual.vision.pos_embed.weight": torch.zeros(2), "nothing.of.ours": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"nothing\.of\.ours: not part of the module tree"):
        save(weights, out, source=folder, dtype=torch.float32, max_shard_bytes=8)
    assert list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ""])
def test_index_may_name_files_of_its_folder_alone(folder, name):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    fault = f"{index}: weight_map names {name!r}, which is not a file of this folder; put all files into one folder"
    assert refusal(folder) == fault
