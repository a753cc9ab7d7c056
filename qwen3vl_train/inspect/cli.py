"""Run launch/inspect_data.py."""

import argparse
import json
import sys
from pathlib import Path

from qwen3vl_train.cli import run_or_explain
from qwen3vl_train.config import load_recipe
from qwen3vl_train.outputs import check_writable, write_text


def inspect_data(argv: list[str] | None = None) -> int:
    """Show the data of a recipe before training, and return the exit code of launch/inspect_data.py."""
    parser = argparse.ArgumentParser(description="Show what the data of a recipe is and what the model will see of it.")
    parser.add_argument("recipe", help="recipe file (YAML or JSON)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.max_tokens_per_pack=4096")
    parser.add_argument("--out", type=Path, help="page to write (default: <name of the recipe>-data.html)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="also write the facts as JSON: to a file, or without one (or with -) to stdout, and all else to stderr",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=12, help="rows shown with images and tokens (default: 12)")
    parser.add_argument(
        "--rows", type=int, default=50_000, help="rows of a source to examine, evenly spaced; 0: all (default: 50000)"
    )
    arguments = parser.parse_intermixed_args(argv)

    def work() -> None:
        from rich.console import Console

        from qwen3vl_train.inspect.page import write_page
        from qwen3vl_train.inspect.recipe import inspect_recipe
        from qwen3vl_train.inspect.table import print_facts
        from qwen3vl_train.tracking.console import IndexProgress

        for name in ("samples", "rows"):
            if getattr(arguments, name) < 0:
                raise ValueError(f"--{name}: got {getattr(arguments, name)}; use 0 or more")
        if "=" in (arguments.json or ""):
            raise ValueError(f"--json: got {arguments.json}; give a file, or - where an override follows")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        out = arguments.out or Path(f"{recipe.name}-data.html")
        for path in (out, *([Path(arguments.json)] if arguments.json not in (None, "-") else [])):
            check_writable(path)
        with IndexProgress() as progress:
            inspection = inspect_recipe(
                recipe, num_samples=arguments.samples, max_rows=arguments.rows or None, progress=progress
            )
        console = Console(stderr=arguments.json == "-")
        print_facts(inspection.facts, console)
        if arguments.json:
            text = json.dumps(inspection.to_json(), indent=2, ensure_ascii=False) + "\n"
            sys.stdout.write(text) if arguments.json == "-" else write_text(Path(arguments.json), text)
        write_page(inspection, out)
        console.print(f"{out}: open it in a browser", markup=False, highlight=False, soft_wrap=True)

    return run_or_explain(work)
