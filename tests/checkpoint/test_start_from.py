"""tune.start_from: a run begins at the weights of another run, or of an adapter of any peft, or says why it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3vl_train.config import LoraTune, load_recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.load_run import restore_run
from qwen3vl_train.train.loop import train
from tests.helpers import oracles, small_runs
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks

LORA = {"method": "lora", "rank": 4, "alpha": 16, "targets": ["text_attn", "merger"], "full": ["deepstack"]}
STILL = {"train__num_steps": 1, "optim__lr": 1e-12}


@pytest.fixture(scope="module")
def first(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and beside it its adapter."""
    out = tmp_path_factory.mktemp("first")
    run = train(small_runs.make_recipe(tiny_folder, task, out, tune=LORA, train__num_steps=2, optim__lr=2e-2))
    export_run(run, out / "adapter", merge=False)
    return run


def _start(tiny_folder: Path, task: Path, out: Path, start: Path, **tune: Any) -> Path:
    values = {"method": "lora", "start_from": str(start), **tune}
    return train(small_runs.make_recipe(tiny_folder, task, out, tune=values, **STILL))


def _refusal(*arguments: Any, **tune: Any) -> str:
    return message_of(ValueError, lambda: _start(*arguments, **tune))


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_weights_and_form_are_those_of_the_source(first, tiny_folder, task, tmp_path, capsys, kind):
    source = first if kind == "run" else first.parent / "adapter"
    run = _start(tiny_folder, task, tmp_path, source)
    where = f"{source}/checkpoints/step-00000002" if kind == "run" else str(source)
    assert f"starts from {where}: weights of 54 tensors" in capsys.readouterr().out.splitlines()
    got, expected = small_runs.final_tensors(run), small_runs.final_tensors(first)
    assert small_runs.largest_difference(got, expected) < 1e-11
    assert max(got[name].abs().max() for name in got if name.startswith("exp_avg/")) < 1.0  # of one step, not three
    tune = load_recipe(run / "recipe.yaml").tune
    assert isinstance(tune, LoraTune)
    assert (tune.rank, tune.alpha, set(tune.targets), tune.full) == (4, 16, {"text_attn", "merger"}, ["deepstack"])
    # The source is not needed any more: neither to resume nor to export.
    moved = first.rename(first.with_name("moved")) if kind == "run" else None
    try:
        _start(tiny_folder, task, tmp_path, source)
        restore_run(run, dtype=torch.float32)
    finally:
        if moved is not None:
            moved.rename(first)


def test_an_adapter_that_peft_made_and_saved(tiny_folder, task, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*language_model\.layers\.\d+\.self_attn\.(q|v)_proj|.*layers\.1\.mlp\.up_proj",
        rank_pattern={"up_proj": 3},
        modules_to_save=["merger"],
    )
    model = get_peft_model(oracles.oracle(tiny_folder), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and "lora" not in name:
                parameter.mul_(1.1)
    model.save_pretrained(str(tmp_path / "theirs"))
    run = _start(tiny_folder, task, tmp_path, tmp_path / "theirs")
    tune = load_recipe(run / "recipe.yaml").tune
    assert isinstance(tune, LoraTune)
    assert tune.targets == [
        r"model\.language_model\.layers\.\d+\.self_attn\.q_proj",
        r"model\.language_model\.layers\.\d+\.self_attn\.v_proj",
        r"model\.language_model\.layers\.1\.mlp\.up_proj",
    ]
    assert (tune.rank, tune.alpha, tune.rslora, tune.full) == ({"text_attn": 2, "text_mlp": 3}, 6, True, ["merger"])
    ours = restore_run(run, dtype=torch.float32).model
    theirs = model.eval()
    folder = tiny_folder
    for name in ("one_image", "text_only"):
        messages = oracles.conversations()[name]["messages"]
        with torch.no_grad():
            expected = theirs(**oracles.oracle_inputs(folder, messages)).logits[0]
        got = ours.logits(MultimodalCollator.from_pretrained(folder)([{"messages": messages}]))
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_rows_of_tokens_start_from_an_adapter(tiny_folder, task, tmp_path):
    first = train(small_runs.make_recipe(tiny_folder, task, tmp_path, tune=small_runs.ROWS, train__num_steps=2))
    adapter = export_run(first, tmp_path / "adapter", merge=False).out
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    (rows,) = (name for name in tensors if name.endswith("trainable_tokens_delta"))
    config["trainable_token_indices"] = {"embed_tokens": config["trainable_token_indices"].popitem()[1][::-1]}
    save_file({**tensors, rows: tensors[rows].flip(0)}, adapter / "adapter_model.safetensors")  # in another order
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run = _start(tiny_folder, task, tmp_path / "out", adapter)
    got, expected = small_runs.final_tensors(run), small_runs.final_tensors(first)
    assert small_runs.largest_difference(got, expected) < 1e-11
    assert _refusal(tiny_folder, task, tmp_path / "other", first, new_tokens=["<|box_end|>", "<|im_end|>"]).startswith(
        "tune.new_tokens: ['<|box_end|>', '<|im_end|>'], but "
    )


def test_more_may_train_than_the_source_holds(tiny_folder, task, tmp_path, capsys):
    """The two stages of a connector: the merger alone, then with the text."""
    tune = {"method": "full", "train": ["merger"]}
    first = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "a", tune=tune, train__num_steps=2))
    both = {"method": "full", "train": ["merger", "text"], "start_from": str(first)}
    second = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "b", tune=both, **STILL))
    assert "weights of 6 tensors; 46 others start anew" in capsys.readouterr().out
    got, expected = small_runs.final_tensors(second), small_runs.final_tensors(first)
    assert small_runs.largest_difference({name: got[name] for name in expected}, expected) < 1e-11
    assert f"{second} holds language_model.model.embed_tokens.weight, which this recipe does not train" in message_of(
        ValueError,
        lambda: train(
            small_runs.make_recipe(tiny_folder, task, tmp_path / "c", tune={**tune, "start_from": str(second)}, **STILL)
        ),
    )


def test_ranks_start_from_it_too(first, tiny_folder, task, tmp_path):
    tune = {"method": "lora", "start_from": str(first)}
    alone = train(small_runs.make_recipe(tiny_folder, task, tmp_path / "a", tune=tune, train__num_steps=2))
    for engine in ("ddp", "fsdp2"):
        recipe = small_runs.make_recipe(
            tiny_folder, task, tmp_path / engine, tune=tune, train__num_steps=2, parallel__engine=engine
        )
        run_ranks(small_runs.train_on_rank, 2, recipe)
        assert small_runs.losses(tmp_path / engine / "run") == pytest.approx(small_runs.losses(alone), rel=1e-5)


def test_what_contradicts_the_source_is_refused(first, tiny_folder, task, tmp_path):
    arguments = (tiny_folder, task, tmp_path / "out", first)
    said = f"but {first} was trained with"
    assert _refusal(*arguments, alpha=8) == f"tune.alpha: 8, {said} 16; remove it here, or give the same"
    assert _refusal(*arguments, rank={"text": 8, "merger": 4}).startswith("tune.rank: {'text': 8, 'merger': 4}, but ")
    assert _refusal(*arguments, dora=True) == f"tune.dora: True, {said} False; remove it here, or give the same"
    assert _refusal(*arguments, targets=["text_mlp", "merger"]) == (
        f"tune.start_from: {first} holds language_model.model.layers.0.self_attn.k_proj.lora_A.default.weight, which "
        f"this recipe does not train; add its group, or merge it (launch/export.py {first} --merge --out DIR) and give "
        "DIR as model.path"
    )
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(first, tiny_folder, task, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.visual.merger.norm.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    adapter = first.parent / "adapter"
    for source in (first, adapter):
        assert _refusal(other, task, tmp_path / "out", source) == (
            f"tune.start_from: {source} was trained on other base weights than those of {other}"
        )
    named = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "Qwen/Qwen3-VL-2B"}))
    assert _refusal(tiny_folder, task, tmp_path / "out", named).startswith(
        f"tune.start_from: {named} was trained on Qwen/Qwen3-VL-2B, model.path is {tiny_folder}; if that is the same, "
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "is IA3, only LORA can be continued"),
        ({"init_lora_weights": "pissa_niter_4"}, "began with init_lora_weights pissa_niter_4, which changed its base"),
    ],
)
def test_adapters_that_cannot_be_continued(first, tiny_folder, task, tmp_path, values, message):
    adapter = shutil.copytree(first.parent / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **values}))
    assert message in _refusal(tiny_folder, task, tmp_path / "out", adapter)


def test_what_is_neither_run_nor_adapter(tiny_folder, task, tmp_path):
    (tmp_path / "empty").mkdir()
    messages = {
        tiny_folder: f"{tiny_folder} is a full checkpoint; give it as model.path",
        tmp_path / "empty": f"{tmp_path / 'empty'} holds no run and no adapter; give runs/<name> or a folder with ",
        tmp_path / "none": f"{tmp_path / 'none'} is not a folder; give runs/<name> or a folder with ",
    }
    for source, message in messages.items():
        assert _refusal(tiny_folder, task, tmp_path / "out", source).startswith(f"tune.start_from: {message}")
