"""A whole job, with secrets in every place where a user may put one: none is in anything that it prints or writes."""

import json
import sys
from pathlib import Path

import yaml

from tests.helpers import launchers, small_runs

JOB = """
import sys
from pathlib import Path
from qwen3vl_train.inspect.cli import inspect_data
from qwen3vl_train.train.cli import evaluate, export, sft

model, missing, streamed = sys.argv[1:]
codes = [
    sft(["recipe.yaml", streamed]), sft(["recipe.yaml", "optim.lr=0.5"]), sft(["recipe.yaml", "name=other", missing]),
    inspect_data(["recipe.yaml", "--json", "facts.json", "--out", "page.html"]),
    export(["runs/run", "--out", "exported"]),
    evaluate([model, "--data", missing.partition("=")[2]]),
]
print("codes", codes)
"""
SECRET = "Pl4nted"
TOKEN = 5 * SECRET
SOURCE = f"file://user:{SECRET}1@host/%s.jsonl#sig={SECRET}2"


def test_no_secret_is_printed_or_written(small: Path, task: Path, tmp_path: Path):
    given = tmp_path / f"user:{SECRET}1@host"  # where fsspec looks for such an address
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    web = f"https://user:{SECRET}3@host/a.png?X-Amz-Signature={SECRET}4"
    long = f"https://{'u' * 180}:{SECRET}{'x' * 60}@host/a.png"
    bad = [
        small_runs.row("Where?", "There.", [name])
        for name in (web, long, f"{web}#{SECRET}", f"https://host/hf_{TOKEN}")
    ]
    bad += [{**rows[1], "url": {web: web}}, {"messages": web}, {"messages": [{"role": web, "content": web}]}]
    small_runs.write_rows(given / f"train.jsonl#sig={SECRET}2", [*rows, *bad])
    small_runs.write_rows(given / f"eval.jsonl#sig={SECRET}2", rows[:3])
    values = small_runs.recipe_values(
        small, task, Path("runs"), tune=small_runs.LORA, train__num_steps=2, checkpoint__export_every_steps=2,
        track={"wandb": "offline", "notes": web}, data__max_rejected_fraction=0.9, data__num_workers=1,
        data__train=[{"path": SOURCE % "train", "media_root": str(task)}],
        data__eval=[{"path": SOURCE % "eval", "media_root": str(task)}],
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    before = set(tmp_path.rglob("*"))
    overrides = [f"data.train.0.path={SOURCE % 'absent'}", f"data.train.0.path={SOURCE % 'train'}"]
    done = launchers.run(
        [sys.executable, "-c", JOB, str(small), *overrides], cwd=tmp_path, QWEN3VL_TRAIN_CACHE=str(tmp_path / "cache"),
        HF_TOKEN=f"hf_{TOKEN}", WANDB_API_KEY=40 * "a", AWS_SECRET_ACCESS_KEY=SECRET, PYTHONPATH=str(launchers.ROOT),
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert "codes [0, 2, 2, 0, 0, 2]" in printed, printed
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file not in before]
    kinds = {"rejected.jsonl", "metrics.jsonl", "eval.jsonl", "recipe.yaml", "README.md", "page.html", "facts.json"}
    assert kinds <= {file.name for file in written}
    assert any(file.suffix == ".wandb" for file in written)
    assert any(file.suffix == ".npz" for file in written)
    for secret in (SECRET, TOKEN, 40 * "a"):
        assert secret not in printed
        for file in written:
            before, found, _ = file.read_bytes().partition(secret.encode())
            assert not found, (file, before[-200:])
            assert secret not in file.name
