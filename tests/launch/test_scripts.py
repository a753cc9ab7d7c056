"""The scripts as a user starts them: in processes of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_train.config import load_recipe
from qwen3vl_train.tracking.metrics import read_metrics
from tests.helpers import launchers, small_runs

METRICS = {
    "step", "epoch", "loss", "grad_norm", "lr", "tokens", "label_tokens", "visual_tokens", "patches",
    "tokens_per_second", "pack_efficiency", "data_wait_fraction", "mfu", "peak_memory_gib", "seconds", "rejected",
    "dropped", "shrunk", "checkpoint_stall_seconds", "rank_balance", "sources",
}  # fmt: skip


def _script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return launchers.run([sys.executable, str(launchers.ROOT / "launch" / f"{name}.py"), *arguments], cwd=cwd)


def _torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return launchers.run(launchers.torchrun(str(launchers.SFT), *arguments), cwd=cwd)


def _recipe(folder: Path, model: Path, task: Path) -> Path:
    case = {"tune": small_runs.LORA, "track": {"wandb": "offline", "project": "tests"}, "data__num_workers": 1}
    case |= {"data__eval": [{"path": str(task / "eval.jsonl")}], "eval": {"every_steps": 3}}
    values = small_runs.recipe_values(model, task, folder / "runs", **case)
    (folder / "recipe.json").write_text(json.dumps(values, indent="\t"))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of 6 steps by two ranks under torchrun: (its folder, what the command said, its recipe file)."""
    folder = tmp_path_factory.mktemp("two-ranks")
    recipe = _recipe(folder, tiny_folder, task)
    said = _torchrun(str(recipe), "optim.lr=5e-4", "checkpoint.keep_last=1", cwd=folder)
    assert said.returncode == 0, said.stderr
    return folder / "runs" / "run", said, recipe


def test_the_run_folder_holds_the_documented_files(finished):
    run, _, _ = finished
    names = {file.name for file in run.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "eval.jsonl", "checkpoints", "logs", "wandb", "wandb_run_id"}
    assert [file.name for file in (run / "logs").iterdir()] == ["rank-1.log"]
    log = (run / "logs" / "rank-1.log").read_text()
    assert " rank 1 of 2 on " in log.splitlines()[0]
    assert "step 6/6 loss" in log
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_every_step_has_a_row_with_every_field(finished):
    run, _, _ = finished
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == METRICS for row in rows)
    evals = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [(row["step"], row["name"]) for row in evals] == [(3, "eval"), (6, "eval")]


def test_the_recipe_of_the_run_is_the_resolved_one(finished):
    run, _, recipe = finished
    kept = load_recipe(run / "recipe.yaml")
    assert kept == load_recipe(recipe, ["optim.lr=5e-4", "checkpoint.keep_last=1"])
    assert "betas" in (run / "recipe.yaml").read_text(), "defaults are written out"


def test_only_the_first_rank_prints(finished):
    run, said, _ = finished
    lines = said.stdout.splitlines()
    model = load_recipe(run / "recipe.yaml").model.path
    assert lines[0] == f"run {run}: {model} in float32, LoRA rank 4, 2 ranks on cpu"
    starts = ("run ", "data: ", "warning: the run has ", "trains ", "  ", "gradient check", "step ", "eval step ")
    assert [line for line in lines if not line.startswith(starts)] == []
    assert len(lines) == len(set(lines))
    table = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert table["vision_attn"] == ["40", "73,216", "6,144", "5.00e-04"]
    assert table["text_embed"] == ["1", "65,536", "0", "frozen"]
    assert any(re.fullmatch(r"step 6/6 loss \d\.\d{4} lr \S+ tokens/s \S+ eta 0:00:00", line) for line in lines)
    assert "Traceback" not in said.stderr


def test_one_process_gives_the_same(finished, tiny_folder, task, tmp_path):
    run, _, _ = finished
    recipe = _recipe(tmp_path, tiny_folder, task)
    said = _script("sft", str(recipe), "optim.lr=5e-4", "track.wandb=off", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    alone = tmp_path / "runs" / "run"
    # Two packs a step: their gradients add up to the same in either order.
    assert small_runs.losses(alone) == pytest.approx(small_runs.losses(run), abs=1e-6)
    assert small_runs.largest_difference(small_runs.final_tensors(run), small_runs.final_tensors(alone)) < 1e-6
    assert not (alone / "wandb").exists()


def test_a_number_of_ranks_that_does_not_fit_is_an_error(tiny_folder, task, tmp_path):
    said = _torchrun(str(_recipe(tmp_path, tiny_folder, task)), "train.packs_per_step=3", cwd=tmp_path)
    assert said.returncode != 0
    message = "recipe run: 1 error\n  - train.packs_per_step: 3 does not divide by 2 ranks; use 2, 4 or 6"
    # torchrun ends the other rank as soon as one has failed, so both or only one may have come to speak.
    assert re.search(rf"^\[rank [01]\] error: {re.escape(message)}\n", said.stderr, re.MULTILINE)
    assert 'launch/sft.py", line' not in said.stderr
    assert said.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", sorted(file.stem for file in (launchers.ROOT / "launch").glob("*.py")))
def test_every_script_explains_itself(name, tmp_path):
    said, wrong = _script(name, "--help", cwd=tmp_path), _script(name, cwd=tmp_path)
    assert (said.returncode, wrong.returncode) == (0, 2)
    assert said.stdout.startswith(f"usage: {name}.py [-h]")
    assert "the following arguments are required" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sft", ["a.json"], "a.json: 1 error\n  - cannot be read (No such file or directory); give a recipe file"),
        ("export", ["none", "--out", "out"], "none: not a run folder (no recipe.yaml); give runs/<name>"),
        (
            "eval",
            ["none", "--data", "a.jsonl"],
            "none: not a folder; give a local Qwen3-VL checkpoint in Hugging Face form",
        ),
    ],
)
def test_a_mistake_gets_a_message_without_a_traceback(name, arguments, message, tmp_path):
    said = _script(name, *arguments, cwd=tmp_path)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == f"error: {message}\n(QWEN3VL_TRACEBACK=1 shows where)\n"
    assert list(tmp_path.iterdir()) == []


def test_the_export_script_writes_an_adapter(finished, tmp_path):
    run, _, _ = finished
    said = _script("export", str(run), "--out", "adapter", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    (line,) = said.stdout.splitlines()
    assert re.fullmatch(
        r"adapter: adapter of step 6, 104 tensors, read back bit-equal; "
        r"logits in stock transformers differ by at most \d\.\de-0\d \(their standard deviation is \d\.\d\d\); "
        r"its ids and pixels are equal to ours",
        line,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
