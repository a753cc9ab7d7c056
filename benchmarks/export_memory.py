"""Measure the memory that an export takes: `python benchmarks/export_memory.py [--size 2b] [--scratch FOLDER]`.

A checkpoint of random weights in bfloat16 and a run with a random adapter on all its linear layers are written, then
exported as `launch/export.py` does. The peak is of the resident set, pages of mapped files included.
"""

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import tiny_checkpoint

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.manifest import KeepPolicy
from qwen3vl_train.checkpoint.safetensors_writer import write_safetensors
from qwen3vl_train.checkpoint.writer import CheckpointWriter
from qwen3vl_train.config import Recipe, recipe_from_dict, run_dir, save_recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.train.build import describe
from qwen3vl_train.train.export import export_run
from qwen3vl_train.train.export import run as steps

_TOWER = {"vision_hidden_size": 1024, "vision_depth": 24, "vision_num_heads": 16, "num_position_embeddings": 2304}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 512, "num_layers": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, **_TOWER},
    "2b": {"hidden_size": 2048, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, **_TOWER},
    "4b": {"hidden_size": 2560, "num_layers": 36, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, **_TOWER},
}
_VOCABULARY = 151936


def write_base(folder: Path, size: str) -> int:
    """Write a checkpoint of random weights; return its bytes."""
    folder.mkdir()
    tokenizer = tiny_checkpoint.build_tokenizer(tiny_checkpoint.default_texts(), 512)
    config = tiny_checkpoint.tiny_config(tokenizer, deepstack_visual_indexes=(5, 11, 17), **_SIZES[size])
    config["text_config"]["vocab_size"] = _VOCABULARY
    tiny_checkpoint.write_processor_files(folder, tokenizer, min_pixels=64 * 64, max_pixels=512 * 512)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in tiny_checkpoint.initial_tensors(config, 0).items()}
    generator = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        if len(shape) > 1
        else torch.full(shape, float(not name.endswith(".bias")))
        for name, shape in shapes.items()
    )
    write_safetensors(folder / "model.safetensors", shapes, tensors, torch.bfloat16)
    return (folder / "model.safetensors").stat().st_size


def write_run(base: Path, out: Path) -> Path:
    """Write the run folder of a LoRA run with random adapters, as if it had trained for a step."""
    recipe: Recipe = recipe_from_dict(
        {
            "name": "run",
            "output_dir": str(out),
            "model": {"path": str(base)},
            "tune": {"method": "lora", "rank": 16, "targets": ["all"]},
            "data": {"train": [{"path": "none.jsonl"}]},
        }
    )
    folder = run_dir(recipe)
    folder.mkdir(parents=True)
    save_recipe(recipe, folder / "recipe.yaml")
    model = describe(Qwen3VLArch.from_pretrained(base), recipe)
    trained = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    state: dict[str, Tensor] = {f"weight/{name}": 0.02 * torch.randn(shape) for name, shape in trained.items()}
    with CheckpointWriter(folder, Ranks(0, 1, 0, torch.device("cpu")), KeepPolicy(1)) as writer:
        writer.start(1, lambda: state, {"updates": 1, "loader": {}, "rejects": {}, "eval": {}})
    return folder


def status(field: str) -> float:
    """Return a field of the memory of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Print the time of a function and the peaks of this process while it ran: all pages, and those of no file."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        started, own = time.perf_counter(), [status("RssAnon")]
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.01):
                own.append(status("RssAnon"))

        thread = threading.Thread(target=sample)
        thread.start()
        result = function(*arguments, **options)
        done.set()
        thread.join()
        seconds = time.perf_counter() - started
        print(f"  {name}: {seconds:.1f} s, peak {status('VmHWM'):.2f} GiB, {max(own):.2f} of no file", flush=True)
        return result

    return wrapped


def export(run: Path, merge: bool) -> None:
    """Export a run and print what each part of it takes."""
    steps.write_adapter_files = measured("adapter written and read back", steps.write_adapter_files)
    steps.write_checkpoint_files = measured("weights merged, written and read back", steps.write_checkpoint_files)
    steps.compare_processing = measured("ids and pixels compared", steps.compare_processing)
    steps.restore_run = measured("our model loaded", steps.restore_run)
    steps.compare_with_transformers = measured("logits of transformers", steps.compare_with_transformers)
    print("export --merge" if merge else "export", flush=True)
    done = export_run(run, run.parent / ("merged" if merge else "adapter"), merge=merge)
    print("  " + "; ".join(done.notes or ["all layers compared"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(_SIZES), default="2b")
    parser.add_argument("--scratch", type=Path, help="where to write; the parent of a folder that is removed")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        export(args.run, args.merge)
        return
    with TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        size = write_base(folder / "base", args.size)
        print(f"base {size / 2**30:.2f} GiB in bfloat16", flush=True)
        run = write_run(folder / "base", folder / "runs")
        for merge in ([], ["--merge"]):  # each in a process of its own, whose peak is not that of the one before
            subprocess.run([sys.executable, __file__, "--run", str(run), *merge], check=True)


if __name__ == "__main__":
    main()
