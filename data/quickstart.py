"""Run everything on a laptop: data, tiny model, full fine-tuning, LoRA, export, accuracy (`make quickstart`).

Every step is a command that a user would type. Each is printed, and skipped if its result is there from an earlier run.
Nothing is downloaded: the digits come with scikit-learn, the checkpoint is drawn at random.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import rich
from rich.table import Table

ROOT = Path("quickstart")
DIGITS = ROOT / "digits"
RUNS = ROOT / "runs"
FULL, LORA = "recipes/digits-full.yaml", "recipes/digits-lora.yaml"
SHUFFLED = f"data.train=[{{path: {DIGITS}/shuffled-train.jsonl, media_root: {DIGITS}}}]"


def export(run: str, out: str, *flags: str) -> list[str]:
    return ["launch/export.py", str(RUNS / run), *flags, "--out", str(ROOT / out)]


# (result that shows the step is done, command)
STEPS: list[tuple[Path, list[str]]] = [
    (DIGITS / "shuffled-train.jsonl", ["data/digits.py", "--out", str(DIGITS)]),
    (ROOT / "tiny" / "model.safetensors", ["data/tiny_checkpoint.py", "--out", str(ROOT / "tiny")]),
    (RUNS / "digits-full/checkpoints/step-00000250", ["launch/sft.py", FULL]),
    (ROOT / "digits-full-export", export("digits-full", "digits-full-export")),
    (RUNS / "digits-shuffled/checkpoints/step-00000250", ["launch/sft.py", FULL, "name=digits-shuffled", SHUFFLED]),
    (RUNS / "digits-lora/checkpoints/step-00000200", ["launch/sft.py", LORA]),
    (ROOT / "digits-lora-adapter", export("digits-lora", "digits-lora-adapter")),
    (ROOT / "digits-lora-merged", export("digits-lora", "digits-lora-merged", "--merge")),
]  # fmt: skip

# (row of the table, model, held-out file, what chance gives)
EVALUATIONS: list[tuple[str, str, str, str]] = [
    ("which digit?  untrained tiny model", "tiny", "eval.jsonl", "10%"),
    ("which digit?  (b) full fine-tuning", "runs/digits-full", "eval.jsonl", "10%"),
    ("which digit?  control: images shuffled", "runs/digits-shuffled", "eval.jsonl", "10%"),
    ("even or odd, and its name?  (b) as it is", "digits-full-export", "words-eval.jsonl", "10%"),
    ("even or odd, and its name?  (c) LoRA on (b)", "runs/digits-lora", "words-eval.jsonl", "10%"),
    ("even or odd, and its name?  (d) merged export", "digits-lora-merged", "words-eval.jsonl", "10%"),
]


def run(arguments: list[str]) -> None:
    """Print and run one command; stop the quickstart if it fails."""
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments])
    if done.returncode:
        sys.exit(f"quickstart: that command failed with exit code {done.returncode}")


def main() -> None:
    started = time.perf_counter()
    for result, command in STEPS:
        if result.exists():
            print(f"{result}: is there already")
        else:
            run(command)
    summaries = []
    (ROOT / "eval").mkdir(exist_ok=True)
    for _, model, data, _ in EVALUATIONS:
        summary = ROOT / "eval" / f"{model.replace('/', '-')}-{data.removesuffix('.jsonl')}.json"
        if not summary.exists():
            options = ["--data", str(DIGITS / data), "--max-new-tokens", "12", "--json", str(summary)]
            run(["launch/eval.py", str(ROOT / model), *options])
        summaries.append(json.loads(summary.read_text()))
    table = Table(
        title="A tiny Qwen3-VL, drawn at random, learns tiny tasks from scratch (scikit-learn's digits, held out)"
    )
    for heading, side in (("task and model", "left"), ("correct", "right"), ("loss", "right"), ("chance", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for (row, _, _, chance), summary in zip(EVALUATIONS, summaries, strict=True):
        table.add_row(row, f"{100 * summary['exact_match']:.1f}%", f"{summary['loss']:.3f}", chance)
    rich.print(table)
    print(
        f"quickstart: {time.perf_counter() - started:.0f} s. See {RUNS}/digits-lora/metrics.jsonl and "
        f"{ROOT}/digits-lora-adapter"
    )


if __name__ == "__main__":
    main()
