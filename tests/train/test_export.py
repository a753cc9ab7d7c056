"""What was trained is what is served: exports give the same results in stock transformers and peft as in the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_train.checkpoint.companions import COMPANION_FILES
from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.model.hf_names import to_huggingface
from qwen3vl_train.model.lora import merge_lora
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import as_trained
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.export.verify import LogitDifference, compare_with_transformers, probe_batches
from qwen3vl_train.train.load_run import restore_run
from qwen3vl_train.train.loop import train
from tests.helpers import faults, oracles, small_runs

# Float32 noise between two programs on this model is 1e-5; the mistakes looked for move logits by 1e-2 and more.
TOLERANCE = 2e-4
RSLORA = {**small_runs.LORA, "rslora": True, "dropout": 0.0}
DORA = {**small_runs.LORA, "dora": True, "targets": ["text_attn", r"model\.visual\.merger\.linear_fc\d"]}
RANKS = {
    **small_runs.LORA,
    "rank": {"text_attn": 2, "text_mlp": 4, "vision": 3, "merger": 4, "deepstack": 5},
    "alpha": {"text": 8, "vision": 2, "merger": 8, "deepstack": 16},
}
WHOLE = {**small_runs.LORA, "targets": ["text_attn"], "full": ["merger", "deepstack", "text_embed", "lm_head"]}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"tune": small_runs.FULL},
    "full-bf16": {"tune": {"method": "full", "train": ["merger", "text"]}, "model__dtype": "bfloat16"},
    "lora": {"tune": small_runs.LORA},
    "lora-bf16": {"tune": RSLORA, "model__dtype": "bfloat16"},
    "dora": {"tune": DORA, "model__hub_id": "Qwen/Qwen3-VL-Tiny"},
    "ranks": {"tune": RANKS},
    "whole": {"tune": WHOLE},
    "rows": {"tune": small_runs.ROWS},
    "rows-bf16": {"tune": small_runs.ROWS, "model__dtype": "bfloat16"},
    "whole-bf16": {"tune": WHOLE, "model__dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function: a name of RUNS -> its run folder, trained once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            recipe = small_runs.make_recipe(
                tiny_folder,
                task,
                tmp_path_factory.mktemp(name),
                train__num_steps=2,
                optim__lr=2e-2,  # high, so that an export of the untrained weights would show
                data__max_visual_tokens_per_image=16,
                data__min_visual_tokens_per_image=6,
                **RUNS[name],
            )
            made[name] = train(recipe)
        return made[name]

    return make


def _messages() -> list[list[dict[str, Any]]]:
    samples = oracles.conversations()
    return [samples[name]["messages"] for name in ("one_image", "several_sizes", "text_only")]


def _largest_difference(ours: Qwen3VLForConditionalGeneration, theirs: Any, folder: Path) -> float:
    """Our model with our collator against the stock model with its own processing, both with the files of `folder`."""
    collate = MultimodalCollator.from_pretrained(folder)
    largest = 0.0
    for messages in _messages():
        with torch.no_grad():
            expected = theirs(**oracles.oracle_inputs(folder, messages)).logits[0]
        largest = max(largest, (ours.logits(collate([{"messages": messages}])) - expected).abs().max().item())
    return largest


@pytest.mark.parametrize("name", ["full", "full-bf16"])
def test_a_full_run_becomes_a_checkpoint(run, tmp_path, name):
    done = export_run(run(name), tmp_path / "out", merge=False)
    assert (done.out, done.kind, done.step, done.num_tensors) == (tmp_path / "out", "checkpoint", 2, 121)
    assert done.difference.largest < TOLERANCE
    trained = restore_run(run(name), dtype=torch.float32).model
    assert _largest_difference(trained, oracles.oracle(done.out), done.out) < TOLERANCE
    written = load_file(done.out / "model.safetensors")
    for parameter_name, parameter in trained.named_parameters():
        assert torch.equal(written[to_huggingface(parameter_name)].float(), parameter), parameter_name
    dtype = "bfloat16" if name == "full-bf16" else "float32"
    assert {str(tensor.dtype) for tensor in load_file(done.out / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((done.out / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ["lora", "lora-bf16", "dora", "ranks", "whole", "whole-bf16", "rows", "rows-bf16"])
def test_an_adapter_loads_on_the_stock_model(run, tiny_folder, tmp_path, name):
    from peft import PeftModel

    done = export_run(run(name), tmp_path / "out", merge=False)
    assert (done.kind, done.step) == ("adapter", 2)
    assert done.difference.largest < TOLERANCE
    # The adapter carries tokenizer and pixel limits, but no config: beside one, our collator and stock's read it all.
    reading = shutil.copytree(done.out, tmp_path / "reading", ignore=shutil.ignore_patterns("adapter_*"))
    shutil.copyfile(tiny_folder / "config.json", reading / "config.json")
    base = oracles.oracle(tiny_folder)
    if name.endswith(
        "bf16"
    ):  # a released base is in bfloat16 already; this one is not, and the run computed with it so
        for parameter in base.parameters():  # not base.bfloat16(): that would round the rotary frequencies too
            parameter.data = parameter.data.bfloat16().float()
    stock = PeftModel.from_pretrained(base, str(done.out)).eval()
    trained = restore_run(run(name), dtype=torch.float32).model
    assert _largest_difference(trained, stock, reading) < TOLERANCE
    untrained = load_qwen3_vl_model(tiny_folder, dtype=torch.float32)
    assert _largest_difference(untrained, stock, reading) > 100 * TOLERANCE


def test_the_adapter_names_exactly_what_was_adapted(run, tmp_path):
    export_run(run("dora"), tmp_path / "out", merge=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    text = [f"model.language_model.layers.{layer}.self_attn.{part}_proj" for layer in range(4) for part in "koqv"]
    assert config["target_modules"] == [*text, "model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"]
    # Not a key more: an older peft refuses those that it does not know.
    stock = "transformers.models.qwen3_vl.modeling_qwen3_vl"
    assert {key: value for key, value in config.items() if key != "target_modules"} == {
        "auto_mapping": {"base_model_class": "Qwen3VLForConditionalGeneration", "parent_library": stock},
        "base_model_name_or_path": "Qwen/Qwen3-VL-Tiny", "bias": "none", "inference_mode": True, "lora_alpha": 8,
        "lora_dropout": 0.1, "peft_type": "LORA", "r": 4, "task_type": None, "use_dora": True,
    }  # fmt: skip
    assert "base_model: Qwen/Qwen3-VL-Tiny" in (tmp_path / "out" / "README.md").read_text()
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.visual.merger.linear_fc1.lora_magnitude_vector" in names
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 3 * 18


def test_every_way_to_open_an_adapter_gives_the_same_logits(run, tiny_folder, tmp_path):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers import Qwen3VLForConditionalGeneration as Stock

    out = export_run(run("lora"), tmp_path / "out", merge=False).out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    base = Stock.from_pretrained(tiny_folder, dtype=torch.float32)
    base.load_adapter(str(out))
    opened = {
        "PeftModel": PeftModel.from_pretrained(Stock.from_pretrained(tiny_folder, dtype=torch.float32), str(out)),
        "AutoPeftModel": AutoPeftModel.from_pretrained(str(out)),
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(str(out)),
        "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32),
        "Qwen3VLForConditionalGeneration": Stock.from_pretrained(out, dtype=torch.float32),
        "load_adapter": base,
    }
    ids = torch.tensor([AutoTokenizer.from_pretrained(out).encode("Name a number.")])
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        logits = {way: model.eval()(**inputs).logits for way, model in opened.items()}
        untrained = Stock.from_pretrained(tiny_folder, dtype=torch.float32).eval()(**inputs).logits
    first = logits.pop("PeftModel")
    assert (first - untrained).abs().max() > 100 * TOLERANCE
    for way, others in logits.items():
        assert torch.equal(others, first), way


def test_rows_of_tokens_are_those_that_peft_trains_alone(run, tiny_folder, tmp_path):
    done = export_run(run("rows"), tmp_path / "out", merge=False)
    added = MultimodalCollator.from_pretrained(tiny_folder).tokenizer.added_tokens
    ids = [token for token, name in added.items() if name in small_runs.ROWS["new_tokens"]]
    config = json.loads((done.out / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.language_model.embed_tokens": ids}
    assert any("rows of tokens" in note for note in done.notes)
    before = load_file(tiny_folder / "model.safetensors")["model.language_model.embed_tokens.weight"]
    export_run(run("rows"), tmp_path / "merged", merge=True)
    after = load_file(tmp_path / "merged" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert (after != before).any(dim=1).nonzero().flatten().tolist() == ids


def test_whole_modules_of_an_adapter_are_named(run, tmp_path):
    """peft's modules_to_save; a tied head is a module of its own there, with the same weights."""
    done = export_run(run("whole"), tmp_path / "out", merge=False)
    saved = json.loads((done.out / "adapter_config.json").read_text())["modules_to_save"]
    visual = [f"model.visual.merger.{part}" for part in ("linear_fc1", "linear_fc2", "norm")]
    assert saved[:2] == ["lm_head", "model.language_model.embed_tokens"]
    assert saved[2] == "model.language_model.norm"
    assert saved[-3:] == visual
    tensors = load_file(done.out / "adapter_model.safetensors")
    head, embedding = (
        tensors["base_model.model.lm_head.weight"],
        "base_model.model.model.language_model.embed_tokens.weight",
    )
    assert torch.equal(head, tensors[embedding])
    whole = (
        "the adapter holds whole modules (merger, deepstack, text_embed, lm_head), which peft reads and vLLM does not"
    )
    assert done.notes == [f"{whole}; export with --merge for it"]
    assert export_run(run("whole"), tmp_path / "merged", merge=True).notes == []


@pytest.mark.parametrize("name", ["lora", "lora-bf16", "dora", "whole", "rows"])
def test_a_merged_adapter_is_a_plain_checkpoint(run, tmp_path, name):
    done = export_run(run(name), tmp_path / "out", merge=True)
    assert (done.kind, done.num_tensors) == ("checkpoint", 121)
    assert done.difference.largest < TOLERANCE
    stock = oracles.oracle(done.out)
    assert _largest_difference(load_qwen3_vl_model(done.out, dtype=torch.float32), stock, done.out) < TOLERANCE
    merged = restore_run(run(name), dtype=torch.float32).model
    merge_lora(merged)
    as_trained(merged, DTYPES["bfloat16" if name == "lora-bf16" else "float32"])
    written = load_file(done.out / "model.safetensors")
    for parameter_name, parameter in merged.named_parameters():
        assert torch.equal(written[to_huggingface(parameter_name)].float(), parameter), parameter_name
    if name != "lora-bf16":  # there the sum of weight and adapter is rounded once more, to 8 bits
        unmerged = restore_run(run(name), dtype=torch.float32).model
        assert _largest_difference(unmerged, stock, done.out) < TOLERANCE


@pytest.mark.parametrize(("name", "merge"), [("lora", False), ("lora", True), ("full", False)])
def test_companions_and_pixel_limits_are_exported_too(run, tiny_folder, tmp_path, name, merge):
    out = export_run(run(name), tmp_path / "out", merge=merge).out
    companions = [file for file in COMPANION_FILES if (tiny_folder / file).is_file()]
    assert len(companions) == 6
    template = json.loads((tiny_folder / "chat_template.json").read_text())["chat_template"]
    assert (out / "chat_template.jinja").read_text() == template
    assert "`" + str(tiny_folder) + "`" in (out / "README.md").read_text()
    for file in companions:
        if "preprocessor" not in file:
            assert (out / file).read_bytes() == (tiny_folder / file).read_bytes(), file
    before = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    after = json.loads((out / "preprocessor_config.json").read_text())
    size = {"shortest_edge": 6 * 1024, "longest_edge": 16 * 1024}
    assert after == {**before, "size": size, "min_pixels": 6 * 1024, "max_pixels": 16 * 1024}
    # Of clips the recipe says nothing: the checkpoint's own limits, and the sampling that it leaves to transformers.
    before = json.loads((tiny_folder / "video_preprocessor_config.json").read_text())
    after = json.loads((out / "video_preprocessor_config.json").read_text())
    assert after == {**before, "fps": 2.0, "min_frames": 4, "max_frames": 768}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("lora", "bfloat16"), ("lora-bf16", "float32")])
def test_the_files_have_the_dtype_that_is_asked_for(run, tmp_path, name, dtype, merge):
    done = export_run(run(name), tmp_path / "out", merge=merge, dtype=dtype)
    assert done.difference.largest < TOLERANCE
    weights = load_file(done.out / ("model.safetensors" if merge else "adapter_model.safetensors"))
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    if merge:
        assert json.loads((done.out / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["lora", "ranks", "whole", "rows"])
def test_as_many_layers_are_compared_as_memory_holds(run, tmp_path, name, merge):
    faults.set_free_memory(2**30 + 15 * 2**19)  # of 4 layers 3 fit
    done = export_run(run(name), tmp_path / "out", merge=merge)
    assert 0 < done.difference.largest < TOLERANCE
    assert done.notes[0] == "compared the first 3 of 4 decoder layers: 1.0 GiB of memory are free, all need 1.0"


def test_nothing_is_compared_where_memory_holds_too_little(run, tmp_path):
    faults.set_free_memory(2**30)
    done = export_run(run("lora"), tmp_path / "out", merge=True)
    assert done.difference is None
    assert done.notes[0].startswith("logits were not compared with transformers: 1.0 GiB of memory are free, 1.0 are")


def test_layers_are_compared_with_all_that_is_wrong_in_them(run, tmp_path):
    faults.set_free_memory(2**30 + 15 * 2**19)
    faults.after_export_companions(_scale_one_weight)
    with pytest.raises(RuntimeError, match="transformers computes other logits"):
        export_run(run("lora"), tmp_path / "out", merge=True)


def test_what_exists_is_not_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"out: exists already; choose another folder or remove it$"):
        export_run(run("full"), tmp_path / "out", merge=False)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_only_a_run_with_a_checkpoint_can_be_exported(run, tmp_path):
    with pytest.raises(ValueError, match=r"nothing: not a run folder \(no recipe\.yaml\); give runs/<name>$"):
        export_run(tmp_path / "nothing", tmp_path / "out", merge=False)
    (tmp_path / "new").mkdir()
    shutil.copy(run("full") / "recipe.yaml", tmp_path / "new")
    with pytest.raises(ValueError, match=r"new: has no checkpoint yet; wait for checkpoint\.every_steps, or"):
        export_run(tmp_path / "new", tmp_path / "out", merge=False)


def _edit_json(file: Path, section: str | None, **values: Any) -> None:
    content = json.loads(file.read_text())
    (content[section] if section else content).update(values)
    file.write_text(json.dumps(content))


def _scale_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.visual.merger.linear_fc2.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.visual.deepstack_merger_list.2.norm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_the_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _change_the_template(folder: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        assert "'<|im_start|>' + message.role" in text
        (folder / name).write_text(text.replace("'<|im_start|>' + message.role", "'<|im_start|> ' + message.role"))


WEIGHTS, COMPANIONS = faults.after_export_weights, faults.after_export_companions
DIFFERENT = "reads back different from what was written; check the disk"
TAMPERINGS = {
    "a weight": (
        WEIGHTS,
        _scale_one_weight,
        f"model.visual.merger.linear_fc2.weight {DIFFERENT}",
    ),
    "a lost weight": (WEIGHTS, _drop_one_weight, f"deepstack_merger_list.2.norm.bias {DIFFERENT}"),
    "a weight later": (COMPANIONS, _scale_one_weight, "transformers computes other logits from it"),
    "a lost weight later": (COMPANIONS, _drop_one_weight, "transformers does not load all of it"),
    "the rotary base": (
        WEIGHTS,
        lambda folder: _edit_json(folder / "config.json", "text_config", rope_theta=10000.0),
        "transformers computes other logits from it",
    ),
    "the DeepStack taps": (
        WEIGHTS,
        lambda folder: _edit_json(folder / "config.json", "vision_config", deepstack_visual_indexes=[1, 2, 3]),
        "transformers computes other logits from it",
    ),
    "the merges": (COMPANIONS, _drop_the_merges, "reads a text as other tokens: "),
    "the template": (COMPANIONS, _change_the_template, "reads a text as other tokens: "),
    "the mean of pixels": (
        COMPANIONS,
        lambda folder: _edit_json(folder / "preprocessor_config.json", None, image_mean=[0.4, 0.5, 0.5]),
        "makes other pixels of a picture, apart by up to 0.2",
    ),
    "the limits of pixels": (
        COMPANIONS,
        lambda folder: _edit_json(folder / "preprocessor_config.json", None, max_pixels=20 * 1024),
        "makes 64 patches of a picture of 192 x 160, we make 48",
    ),
    "the class of a processor": (
        COMPANIONS,
        lambda folder: _edit_json(folder / "preprocessor_config.json", None, image_processor_type="Other"),
        r"transformers cannot read it \(",
    ),
}


@pytest.mark.parametrize("tampering", TAMPERINGS.values(), ids=TAMPERINGS)
def test_an_export_that_differs_is_removed(run, tmp_path, tampering):
    after, tamper, message = tampering
    after(tamper)
    with pytest.raises(RuntimeError, match=message):
        export_run(run("full"), tmp_path / "out", merge=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"lora_alpha": 9}, {"use_rslora": True}, {"r": 2}], ids=str)
def test_an_adapter_that_peft_applies_differently_is_an_error(run, tmp_path, values):
    faults.after_export_companions(lambda folder: _edit_json(folder / "adapter_config.json", None, **values))
    with pytest.raises(RuntimeError):
        export_run(run("lora"), tmp_path / "out", merge=False)
    assert list(tmp_path.iterdir()) == []


def test_tolerance_is_relative_to_the_std_of_the_logits():
    assert LogitDifference(largest=1e-3, std=1.0).within_tolerance
    assert not LogitDifference(largest=1e-3, std=0.1).within_tolerance
    assert not LogitDifference(largest=float("nan"), std=1.0).within_tolerance


def test_logits_that_are_not_numbers_are_not_within_tolerance(tiny_folder):
    batches = probe_batches(MultimodalCollator.from_pretrained(tiny_folder))
    vocab_size = load_qwen3_vl_model(tiny_folder).arch.text.vocab_size
    logits = [torch.full((batch.num_tokens, vocab_size), float("nan")) for batch in batches]
    found = compare_with_transformers(logits, batches, checkpoint=tiny_folder, dtype=torch.float32, adapter=None)
    assert not found.within_tolerance
