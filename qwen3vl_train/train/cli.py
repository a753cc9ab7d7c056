"""The main functions of the scripts in launch/: read the command line, call one function, print errors as messages."""

import argparse
import contextlib
import json
from pathlib import Path

from qwen3vl_train.cli import run_or_explain
from qwen3vl_train.config import load_recipe
from qwen3vl_train.outputs import check_writable, write_text


def sft(argv: list[str] | None = None) -> int:
    """launch/sft.py: train from a recipe."""
    parser = argparse.ArgumentParser(
        description="Fine-tune Qwen3-VL from a recipe; start it with torchrun for several ranks."
    )
    parser.add_argument("recipe", help="recipe file (YAML or JSON)")
    # DeepSpeed's launcher passes it besides setting the environment, which is what we read.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=2e-5 train.num_steps=100")
    arguments, others = parser.parse_known_args(argv)
    # As `wandb agent` writes them by default.
    overrides = [*arguments.overrides, *(other.removeprefix("--") for other in others)]
    if unknown := [other for other in others if "=" not in other]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")

    def work() -> None:
        from qwen3vl_train.tracking.wandb_settings import name_trial
        from qwen3vl_train.train.loop import train

        train(name_trial(load_recipe(arguments.recipe, overrides)))

    return run_or_explain(work)


def export(argv: list[str] | None = None) -> int:
    """launch/export.py: write an adapter or a checkpoint from a run."""
    parser = argparse.ArgumentParser(description="Write what a run trained, and check it against stock transformers.")
    parser.add_argument("run", type=Path, help="run folder, runs/<name>")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--merge", action="store_true", help="write a full checkpoint with the adapter merged in")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the files (default: the recipe's)")
    _add_checkpoint_choice(parser)
    arguments = parser.parse_args(argv)

    def work() -> None:
        from qwen3vl_train.train.export import export_run

        done = export_run(
            arguments.run, arguments.out, merge=arguments.merge, step=arguments.step, best=arguments.best,
            dtype=arguments.dtype,
        )  # fmt: skip
        for note in done.notes:
            print(note)
        difference = done.difference
        logits = "" if difference is None else (
            f"logits in stock transformers differ by at most {difference.largest:.1e} "
            f"(their standard deviation is {difference.std:.2f}); "
        )  # fmt: skip
        print(
            f"{done.out}: {done.kind} of step {done.step}, {done.num_tensors} tensors, read back bit-equal; {logits}"
            "its ids and pixels are equal to ours"
        )

    return run_or_explain(work)


def _add_checkpoint_choice(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    choice.add_argument(
        "--best", nargs="?", const="", metavar="NAME",
        help="checkpoint with the lowest loss on this held-out set (default: that of checkpoint.keep_best)",
    )  # fmt: skip


def evaluate(argv: list[str] | None = None) -> int:
    """launch/eval.py: loss, answers and exact matches of a run or model on a file of samples."""
    parser = argparse.ArgumentParser(description="Loss, generated answers and exact matches on held-out samples.")
    parser.add_argument("model", type=Path, help="run folder, or a Qwen3-VL checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of samples")
    parser.add_argument("--media-root", type=Path, help="folder of its images (default: the folder of the file)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: what the run or checkpoint has")
    _add_checkpoint_choice(parser)
    parser.add_argument("--out", type=Path, help="write each question's answer here, one JSON object a line")
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = parser.parse_args(argv)

    def work() -> None:
        from qwen3vl_train.train.answers import evaluate_answers

        for path in filter(None, (arguments.out, arguments.json)):
            check_writable(path)
        summary, answers = evaluate_answers(
            arguments.model, arguments.data, media_root=arguments.media_root,
            max_new_tokens=arguments.max_new_tokens, dtype=arguments.dtype, step=arguments.step, best=arguments.best,
        )  # fmt: skip
        if summary["note"]:
            print(summary["note"])
        for answer in answers[:5]:
            print(f"{answer['id']}: expected {answer['expected']!r}, got {answer['answer']!r}")
        print(
            f"{summary['num_samples']} samples: loss {summary['loss']:.4f} over {summary['label_tokens']} label "
            f"tokens, exact match {100 * summary['exact_match']:.1f}%"
            + (f", {summary['num_rejected']} rows rejected" if summary["num_rejected"] else "")
        )
        # After the summary, which is then known whatever the disk refuses, and each also where the other one fails.
        with contextlib.ExitStack() as outputs:
            if arguments.json:
                outputs.callback(write_text, arguments.json, json.dumps(summary, indent=2) + "\n")
            if arguments.out:
                lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
                outputs.callback(write_text, arguments.out, "".join(lines))

    return run_or_explain(work)
