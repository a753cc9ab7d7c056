"""Exports that a run writes while it trains."""

import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from qwen3vl_train.checkpoint.adapter import adapter_tensors
from qwen3vl_train.checkpoint.atomic import atomic_folder
from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import full_tensor, global_shape
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.export.files import write_adapter_files, write_checkpoint_files


def export_while_training(recipe: Recipe, model: Qwen3VLForConditionalGeneration, out: Path, ranks: Ranks) -> float:
    """Write the adapter, or the full checkpoint of a full run, in Hugging Face form from the running model.

    Sharded weights are gathered tensor by tensor; rank 0 writes. An export of the same step is replaced. Not compared
    with transformers, as `export_run` does. Every rank must call it. Returns the seconds it took. Raises RuntimeError
    on all ranks where it cannot be written.
    """
    started, dtype = time.perf_counter(), DTYPES[recipe.model.dtype]
    is_lora = isinstance(recipe.tune, LoraTune)
    members = adapter_tensors(model) if is_lora else dict(model.named_parameters())
    gathered = ((name, full_tensor(tensor).detach()) for name, tensor in members.items())
    fault: Exception | None = None
    if ranks.is_main:
        try:
            collate = open_collator(recipe)
            shutil.rmtree(out, ignore_errors=True)
            with atomic_folder(out) as folder:
                if is_lora:
                    write_adapter_files(recipe, model, dict(gathered), folder, collate, dtype)
                else:
                    shapes = {name: tuple(global_shape(tensor)) for name, tensor in members.items()}
                    write_checkpoint_files(recipe, gathered, shapes, folder, collate, dtype)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            fault = error
    for _ in gathered:  # the other ranks take part in every gather, and rank 0 in those that it did not reach
        pass
    failure = ranks.gather(None if fault is None else str(fault))[0]
    if failure is not None:
        raise RuntimeError(
            f"{out}: could not be written ({failure}); make room or set checkpoint.export_every_steps: null, then "
            "start the run again; launch/export.py writes the same later"
        ) from fault
    return time.perf_counter() - started
