"""Imports go down only, heavy packages are imported where they are used, and using a model imports none of them."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "qwen3vl_train"
# Each part of the package and the parts it may import; what is not here does not exist. Floors from the ground up.
BELOW = {
    "arch": set(),
    "batch": set(),
    "modules": set(),
    "atomic_file": set(),
    "outputs": set(),
    "public_names": set(),
    "cli": {"dist", "public_names"},
    "dist": set(),
    "config": {"atomic_file", "modules", "public_names"},
    "model": {"arch", "batch", "modules"},
    "model.costs": {"arch", "batch", "modules"},  # a floor of its own below data, whose planner weighs samples with it
    "data": {"arch", "atomic_file", "batch", "config", "model.costs", "modules", "outputs", "public_names"},
    "parallel": {"arch", "batch", "config", "dist", "model", "modules"},
    "checkpoint": {"arch", "atomic_file", "batch", "config", "dist", "model", "modules", "outputs"},
    "tracking": {
        "arch", "atomic_file", "batch", "checkpoint", "config", "data", "dist", "model", "modules", "outputs",
        "parallel", "public_names",
    },
    "train": {
        "arch", "atomic_file", "batch", "checkpoint", "cli", "config", "data", "dist", "model", "modules", "outputs",
        "parallel", "public_names", "tracking",
    },
    "inspect": {
        "arch", "batch", "cli", "checkpoint", "config", "data", "dist", "modules", "outputs", "public_names",
        "tracking",
    },
}  # fmt: skip
# The package itself re-exports these, when they are asked for.
FRONT = {"checkpoint", "data", "model"}
# Slow to import or optional, so never at the top of a module.
HEAVY = {
    "accelerate", "av", "bitsandbytes", "datasets", "deepspeed", "matplotlib", "peft", "sklearn", "torchvision",
    "transformers", "wandb",
}  # fmt: skip
# transformers only ever judges what was written.
MAY_IMPORT_TRANSFORMERS = {"train/export/verify.py", "train/export/verify_files.py"}
NEVER = {"tests", "tiny_checkpoint", "digits", "launch", "pickle", "pytest"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, at any level; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def faults(package: Path) -> list[str]:
    """Every import of the package that goes up, sideways, or takes what it must not."""
    found = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        path = name.removesuffix(".py").replace("/", ".")
        part = path if path in BELOW else path.split(".")[0]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, module in imports(tree):
            top, _, rest = module.partition(".")
            target = rest.split(".")[0]
            allowed = {part, "", "__version__"} | (FRONT if part == "__init__" else BELOW[part])
            if top == PACKAGE and target not in allowed and ".".join(rest.split(".")[:2]) not in allowed:
                found.append(f"{name}:{line}: {part} may not import {target}")
            elif top in NEVER or (top == "transformers" and name not in MAY_IMPORT_TRANSFORMERS):
                found.append(f"{name}:{line}: {part} may not import {top}")
        at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for line, module in imports(ast.Module(at_top, [])):
            if module.split(".")[0] in HEAVY:
                found.append(f"{name}:{line}: imports {module.split('.')[0]} at the top; import it where it is used")
    return found


def test_the_package_keeps_to_its_floors():
    assert faults(ROOT / PACKAGE) == []


def test_every_part_is_on_a_floor():
    parts = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} == {part for part in BELOW if "." not in part}


def test_no_part_imports_one_that_imports_it_back():
    for part, below in BELOW.items():
        assert all(part not in BELOW[other] for other in below)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("data/packing/plan.py", "\nfrom qwen3vl_train.train.loop import train", "2: data may not import train"),
        ("data/packing/plan.py", "def f():\n    import qwen3vl_train.model.text", "2: data may not import model"),
        ("model/costs.py", "from qwen3vl_train.model.text import Rope", "1: model.costs may not import model"),
        ("model/loss.py", "from qwen3vl_train import checkpoint", "1: model may not import checkpoint"),
        ("arch.py", "from qwen3vl_train.batch import Segments", "1: arch may not import batch"),
        ("train/loop.py", "def f():\n    from transformers import AutoModel", "2: train may not import transformers"),
        ("model/lora.py", "import peft", "1: imports peft at the top; import it where it is used"),
        ("checkpoint/writer.py", "import pickle", "1: checkpoint may not import pickle"),
    ],
)
def test_faults_are_named(tmp_path, file, text, fault):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "batch.py").write_text("from dataclasses import dataclass\nimport torch\n")
    assert faults(tmp_path) == [f"{file}:{fault}"]


def loaded_modules(code: str, *arguments: str) -> set[str]:
    """Run code in a fresh interpreter; return the names of the top-level modules that it had loaded at the end."""
    code += "\nimport sys\nprint(*{m.split('.')[0] for m in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return set(ran.stdout.split())


def test_importing_the_package_imports_next_to_nothing():
    loaded = loaded_modules("import qwen3vl_train")
    assert "qwen3vl_train" in loaded
    assert loaded.isdisjoint(HEAVY | {"torch", "pydantic", "yaml", "PIL", "tokenizers"})


def test_a_model_and_its_data_need_neither_transformers_nor_peft(tiny_folder):
    code = """
import sys
from qwen3vl_train import MultimodalCollator, Qwen3VLForConditionalGeneration, load_qwen3_vl_model
model = load_qwen3_vl_model(sys.argv[1])
batch = MultimodalCollator.from_pretrained(sys.argv[1])(
    [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}]
)
loss, _ = model(batch)
loss.backward()
Qwen3VLForConditionalGeneration(model.arch)
"""
    loaded = loaded_modules(code, str(tiny_folder))
    assert {"torch", "safetensors", "tokenizers"} <= loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_front_names_only_what_exists():
    import qwen3vl_train

    assert sorted(qwen3vl_train.__all__) == qwen3vl_train.__all__
    assert all(getattr(qwen3vl_train, name).__name__ == name for name in qwen3vl_train.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'load_qwen2'"):
        qwen3vl_train.load_qwen2  # noqa: B018
