import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.arch import Qwen3VLArch, published_config, read_config
from tests.helpers.messages import message_of


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> dict[str, Any]:
    return json.loads((tiny_folder / "config.json").read_text())


def in_the_dialect_of_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same model as `save_pretrained` of transformers 5 writes it."""
    new = deepcopy(config)
    text, vision = new["text_config"], new["vision_config"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    vision["model_type"] = "qwen3_vl_vision"
    text["tie_word_embeddings"] = not new["tie_word_embeddings"]  # a class default: the top level decides
    return new


def test_numbers_are_read(config):
    arch = Qwen3VLArch.from_dict(config)
    assert (arch.vision.depth, arch.vision.hidden_size, arch.vision.head_dim) == (4, 64, 32)
    assert (arch.vision.position_table_side, arch.vision.patch_dim) == (8, 1536)
    assert arch.vision.deepstack_visual_indexes == (0, 1, 2)
    assert (arch.text.num_attention_heads, arch.text.num_key_value_heads, arch.text.head_dim) == (4, 2, 32)
    assert (arch.text.rope_theta, arch.text.rms_norm_eps) == (5_000_000, 1e-6)
    assert arch.text.mrope_section == (6, 5, 5)
    assert arch.tie_word_embeddings is True
    assert arch.image_token_id == config["image_token_id"]


def test_both_dialects_are_the_same_model(config):
    assert Qwen3VLArch.from_dict(in_the_dialect_of_transformers_5(config)) == Qwen3VLArch.from_dict(config)


def test_transformers_writes_what_we_read(make_oracle):
    published = Qwen3VLArch.from_pretrained(make_oracle(vision_depth=24, tie=True, dialect="published"))
    saved = Qwen3VLArch.from_pretrained(make_oracle(vision_depth=27, tie=False, dialect="saved"))
    assert (published.vision.deepstack_visual_indexes, published.tie_word_embeddings) == ((5, 11, 17), True)
    assert (saved.vision.deepstack_visual_indexes, saved.tie_word_embeddings) == ((8, 16, 24), False)
    assert (published.text.rope_theta, saved.text.rope_theta) == (5_000_000, 1_000_000)
    assert (published.text.rms_norm_eps, saved.text.rms_norm_eps) == (1e-6, 1e-5)


def test_published_config_of_either_dialect(config):
    newer = in_the_dialect_of_transformers_5({**config, "something_new": [1]})
    before = deepcopy(newer)
    written = published_config(newer, dtype="bfloat16")
    assert newer == before, "the config handed in must stay as it is"
    assert written["something_new"] == [1]
    assert written["dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert written["text_config"]["tie_word_embeddings"] is written["tie_word_embeddings"] is True
    assert Qwen3VLArch.from_dict(written) == Qwen3VLArch.from_dict(config)
    for section in ("text_config", "vision_config"):
        extra = {"dtype"} if section == "text_config" else set()
        assert set(written[section]) - extra == set(config[section]) - extra
    assert published_config(config, dtype="float32") == {**config, "dtype": "float32"}


def test_every_fault_is_named_at_once(config):
    broken = deepcopy(config)
    del broken["text_config"]["head_dim"]
    broken["text_config"].update(hidden_size="large", attention_bias=True, num_hidden_layers=True)
    broken["vision_config"].update(hidden_act="gelu", depth=None)
    broken["text_config"]["rope_scaling"].update(mrope_interleaved=False, rope_type="yarn")
    del broken["image_token_id"]
    assert message_of(ValueError, Qwen3VLArch.from_dict, broken, where="here/config.json").splitlines() == [
        "here/config.json: 9 faults",
        "  - text_config: rope_type 'yarn' is not known; only 'default' is",
        "  - text_config: mrope_interleaved is not true; Qwen3-VL interleaves its three position axes",
        "  - vision_config.hidden_act is 'gelu'; Qwen3-VL has 'gelu_pytorch_tanh'",
        "  - text_config.attention_bias is true; Qwen3-VL has none",
        "  - vision_config.depth: missing",
        "  - text_config.hidden_size: 'large' is not a number of the right kind",
        "  - text_config.num_hidden_layers: True is not a number of the right kind",
        "  - text_config.head_dim: missing",
        "  - image_token_id: missing",
    ]


CONTRADICTIONS = [
    ("vision_config", {"num_heads": 5}, "vision hidden_size / num_heads must be a multiple of 4"),
    ("vision_config", {"out_hidden_size": 96}, "vision out_hidden_size 96 is not the text hidden_size 128"),
    ("vision_config", {"num_position_embeddings": 63}, "num_position_embeddings is not a square"),
    (
        "vision_config",
        {"deepstack_visual_indexes": [1, 4]},
        "deepstack_visual_indexes (1, 4) leave the 4 vision blocks",
    ),
    ("text_config", {"num_hidden_layers": 2}, "more DeepStack features than decoder layers"),
    ("text_config", {"num_key_value_heads": 3}, "attention heads do not divide by kv heads"),
    ("text_config", {"head_dim": 64}, "mrope_section (6, 5, 5) does not sum to head_dim/2 = 32"),
]


@pytest.mark.parametrize(("section", "change", "message"), CONTRADICTIONS)
def test_contradictions(config, section, change, message):
    broken = deepcopy(config)
    broken[section].update(change)
    assert message_of(ValueError, Qwen3VLArch.from_dict, broken).splitlines()[1:] == [f"  - {message}"]


def test_sections_that_are_missing(config):
    with pytest.raises(ValueError, match="text_config: missing or not an object"):
        Qwen3VLArch.from_dict({**config, "text_config": 3})


def test_files_that_are_not_a_config(tmp_path):
    for content, message in ((None, "no config.json"), ("{", "not JSON"), ("[]", "holds a list, not an object")):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not JSON"):
        read_config(tmp_path)


def _run_folder(folder: Path) -> str:
    (folder / "recipe.yaml").write_text("name: run\n")
    (folder / "checkpoints").mkdir()
    return (
        f"{folder}: the folder of a run; set tune.start_from: {folder} beside the base that it was trained on, or "
        f"merge it first (launch/export.py {folder} --merge --out merged) and give that"
    )


def _adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct"}')
    return (
        f"{folder}: an adapter of Qwen/Qwen3-VL-4B-Instruct; give its base as model.path, and this folder as "
        "tune.start_from to train it further"
    )


def _damaged_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("[")
    return f"{folder}: an adapter; give its base as model.path, and this folder as tune.start_from to train it further"


@pytest.mark.parametrize("make", [_run_folder, _adapter, _damaged_adapter])
def test_folders_that_are_not_checkpoints_are_named(tmp_path, make):
    expected = make(tmp_path)
    assert message_of(ValueError, read_config, tmp_path) == expected


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("none", "not a folder; {wanted}"),
        ("~/model", "not a folder, ~ is not expanded here; {wanted} by its whole path"),
        ("a/b", "not a folder; {wanted}, or get it first: hf download a/b --local-dir a/b"),
        (
            "hub/models--a--b-c/snapshots/0f",
            "not in the cache of the Hub any more; get it again: hf download a/b-c --revision 0f",
        ),
        ("file", "a file; {wanted}, the folder that holds config.json"),
    ],
)
def test_paths_that_are_no_folder_are_named(tmp_path, monkeypatch, path, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    wanted = "give a local Qwen3-VL checkpoint in Hugging Face form"
    assert message_of(ValueError, read_config, path) == f"{path}: {what.format(wanted=wanted)}"


@pytest.mark.parametrize(
    ("section", "change", "fault"),
    [
        ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers: 1000000000 is not between 1 and"),
        ("text_config", {"num_key_value_heads": 0}, "text_config.num_key_value_heads: 0 is not between 1 and 4,096"),
        ("text_config", {"num_attention_heads": -8}, "text_config.num_attention_heads: -8 is not between 1 and 4,096"),
        (
            "text_config",
            {"vocab_size": 10**1000},
            "text_config.vocab_size: an integer of 3,322 bits is not between 1 and",
        ),
        ("text_config", {"rope_theta": 1e300}, "text_config.rope_theta: 1e+300 is not between 1 and"),
        ("vision_config", {"depth": 10**7}, "vision_config.depth: 10000000 is not between 1 and 1,000"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size: 0 is not between 1 and 1,024"),
        ("vision_config", {"num_position_embeddings": -4}, "vision_config.num_position_embeddings: -4 is not between"),
        ("vision_config", {"deepstack_visual_indexes": ["a"]}, "vision_config.deepstack_visual_indexes: ['a'] is not"),
    ],
)
def test_numbers_out_of_bounds_are_named(config, section, change, fault):
    with pytest.raises(ValueError) as caught:
        Qwen3VLArch.from_dict({**config, section: {**config[section], **change}})
    assert f"  - {fault}" in str(caught.value)


def test_adapter_beside_a_checkpoint_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r": holds adapter_config.json beside config.json: transformers would load that"
    ):
        read_config(tmp_path)


def test_code_does_not_travel_into_a_published_config(config):
    code = {"AutoModel": "evil.Model"}
    marked = {**config, "auto_map": code, "text_config": {**config["text_config"], "auto_map": code}}
    assert published_config(marked, dtype="float32") == published_config(config, dtype="float32")
