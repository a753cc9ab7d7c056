"""Count what a newcomer has to read: files and lines, the files that one row and one weight pass, the calls from recipe
to step.

    python benchmarks/structure.py            the package and the tests, as they are
    python benchmarks/structure.py --road     trace one training step on one image row, then an export (about 30 s)
"""

import argparse
import ast
import json
import runpy
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qwen3vl_train"
ROW_ROOMS = ("data/", "batch.py", "model/", "train/step.py", "train/data.py", "train/loop.py")
"""Files in which a row is handled, from the bytes of its file to the sum of its losses."""
WEIGHT_ROOMS = (
    *("arch.py", "modules.py", "dist/tensors.py", "model/", "parallel/", "checkpoint/"),
    *(f"train/{name}.py" for name in ("build", "tune", "step", "loop", "export", "load_run", "verify")),
)
"""Files in which a weight is handled, from safetensors to the exported adapter."""


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def functions(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (lines, name) of every function of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, node.name


def import_graph() -> dict[str, set[str]]:
    """Return, for each module of the package, the modules of the package that it imports anywhere in its text."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in python_files(PACKAGE)}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & names.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {name: reachable(name) for name in graph}
    groups = {
        tuple(sorted({name, *(other for other in reached[name] if name in reached[other])}))
        for name in graph
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def print_static() -> None:
    for title, folder in (("package", PACKAGE), ("tests", ROOT / "tests")):
        rooms: dict[str, list[Path]] = {}
        for file in python_files(folder):
            rooms.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file)
        print(f"{title}: files and lines of each room")
        for room, files in rooms.items():
            print(f"  {room:<24}{len(files):>4}{sum(map(num_lines, files)):>8,}")
        lengths = {file.relative_to(folder).as_posix(): num_lines(file) for file in python_files(folder)}
        longest = max(lengths, key=lambda name: lengths[name])
        print(
            f"  {'all':<24}{len(lengths):>4}{sum(lengths.values()):>8,}   "
            f"median {statistics.median(lengths.values()):g}"
        )
        print(f"  longest file {longest}, {lengths[longest]}; most files in a room {max(map(len, rooms.values()))}")
    lines, name, file = max(
        (lines, name, file.name) for file in python_files(PACKAGE) for lines, name in functions(file)
    )
    print(f"longest function of the package: {file}: {name}, {lines} lines")
    print(f"import circles: {circles(import_graph()) or 'none'}")


class Trace:
    """Record the package's files that run, and the call stack when `train_step` is first entered."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(str(PACKAGE)) or frame.f_code.co_name == "<module>":
            return
        self.files.add(Path(file).relative_to(PACKAGE).as_posix())
        if frame.f_code.co_name == "train_step" and not self.stack:
            at: FrameType | None = frame
            while at is not None:
                if at.f_code.co_filename.startswith(str(PACKAGE)):
                    name = Path(at.f_code.co_filename).relative_to(PACKAGE).as_posix()
                    self.stack.insert(0, f"{name}:{at.f_code.co_name}")
                at = at.f_back

    def of_rooms(self, rooms: tuple[str, ...]) -> list[str]:
        return sorted(name for name in self.files if name.startswith(rooms) and not name.endswith("__init__.py"))


def print_road() -> None:
    import torch
    from PIL import Image

    from qwen3vl_train.config import load_recipe
    from qwen3vl_train.train.export import export_run
    from qwen3vl_train.train.loop import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runpy.run_path(str(ROOT / "data" / "tiny_checkpoint.py"))["write_tiny_checkpoint"](folder / "model")
        Image.new("RGB", (96, 64), "red").save(folder / "a.png")
        content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which colour?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
        (folder / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        values = {
            "name": "road",
            "output_dir": str(folder / "runs"),
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "tune": {"method": "lora", "rank": 4, "alpha": 8, "targets": ["text_attn"]},
            "data": {"train": [{"path": str(folder / "train.jsonl")}], "max_tokens_per_pack": 512, "num_workers": 0},
            "optim": {"lr": 1e-4},
            "train": {"num_steps": 1, "packs_per_step": 1},
            "parallel": {"engine": "single"},
            "track": {"wandb": "off"},
        }
        (folder / "recipe.json").write_text(json.dumps(values))
        traces = Trace(), Trace()
        recipe = load_recipe(folder / "recipe.json", [])
        sys.setprofile(traces[0])
        run = train(recipe)
        sys.setprofile(traces[1])
        export_run(run, folder / "adapter", merge=False)
        sys.setprofile(None)
    row = traces[0].of_rooms(ROW_ROOMS)
    weight = sorted({*traces[0].of_rooms(WEIGHT_ROOMS), *traces[1].of_rooms(WEIGHT_ROOMS)})
    for title, names in (("one row, JSONL to loss", row), ("one weight, safetensors to adapter", weight)):
        print(f"{title}: {len(names)} files")
        for room, count in Counter(name.rpartition("/")[0] or "." for name in names).items():
            print(f"  {room:<24}{count:>4}")
    print(f"from train(recipe) to train_step: {len(traces[0].stack)} calls: {' -> '.join(traces[0].stack)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--road", action="store_true", help="trace one training step and an export")
    if parser.parse_args().road:
        print_road()
    else:
        print_static()


if __name__ == "__main__":
    main()
