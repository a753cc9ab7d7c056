"""Export of a run: a PEFT adapter or a full checkpoint, checked by loading it into stock transformers."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from qwen3vl_train.checkpoint.adapter import ADAPTER_CONFIG, expect_equal, write_adapter
from qwen3vl_train.checkpoint.atomic import atomic_folder
from qwen3vl_train.checkpoint.companions import copy_companions, write_card
from qwen3vl_train.checkpoint.hf import WeightFiles, write_huggingface
from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.template import find_template
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import full_tensor, global_shape
from qwen3vl_train.model.lora import adapter_tensors, merge_lora
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import as_trained
from qwen3vl_train.train.load_run import RestoredRun, restore_run
from qwen3vl_train.train.verify import LogitDifference, compare_with_transformers, probe_batches


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    out: Path
    kind: str  # 'adapter' or 'checkpoint'
    step: int
    num_tensors: int
    difference: LogitDifference  # between our model in memory and transformers with the written files


def export_run(run: Path, out: Path, *, merge: bool) -> Exported:
    """Write a run's newest checkpoint to `out`: an adapter, or a full checkpoint with `merge` or after full tuning.

    Both include tokenizer, template and the pixel limits that were used. The files are read back: every tensor must be
    bit-equal to what was written, and stock transformers (and peft) must give the same logits on probe conversations.
    All arithmetic is in float32; the files have the recipe's dtype. Raises ValueError where `out` exists, RuntimeError,
    without creating `out`, where a check fails.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder or remove it")
    restored = restore_run(run, dtype=torch.float32)
    recipe, model = restored.recipe, restored.model
    as_adapter = isinstance(recipe.tune, LoraTune) and not merge
    collate = open_collator(recipe)
    batches = probe_batches(collate)
    with atomic_folder(out) as folder:
        if as_adapter:
            num_tensors = _write_adapter(recipe, adapter_tensors(model), folder, collate)
        else:
            num_tensors = _write_checkpoint(restored, folder, collate)
        logits = [model.logits(batch) for batch in batches]
        base = Path(recipe.model.path) if as_adapter else folder
        step, dtype = restored.step, DTYPES[recipe.model.dtype]
        del model, restored  # one model in memory at a time
        adapter = folder if as_adapter else None
        difference = compare_with_transformers(logits, batches, checkpoint=base, dtype=dtype, adapter=adapter)
        if not difference.within_tolerance:
            raise RuntimeError(
                f"{out}: not written; transformers computes other logits from it (difference {difference.largest:.2e}, "
                f"standard deviation of the logits {difference.std:.2f}); please report it"
            )
    return Exported(out, "adapter" if as_adapter else "checkpoint", step, num_tensors, difference)


def export_while_training(recipe: Recipe, model: Qwen3VLForConditionalGeneration, out: Path, ranks: Ranks) -> float:
    """Write the adapter, or the full checkpoint of a full run, in Hugging Face form from the running model.

    Sharded weights are gathered tensor by tensor; rank 0 writes. An export of the same step is replaced. Not compared
    with transformers, as `export_run` does. Every rank must call it. Returns the seconds it took. Raises RuntimeError
    on all ranks where it cannot be written.
    """
    started = time.perf_counter()
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
                    _write_adapter(recipe, dict(gathered), folder, collate)
                else:
                    sizes = {name: global_shape(tensor).numel() for name, tensor in members.items()}
                    _write_weights(recipe, gathered, sizes, folder, collate)
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


def _write_weights(
    recipe: Recipe, weights: Iterable[tuple[str, Tensor]], sizes: dict[str, int], out: Path, collate: MultimodalCollator
) -> None:
    write_huggingface(weights, sizes, out, source=recipe.model.path, dtype=DTYPES[recipe.model.dtype])
    _copy_companions(recipe, out, collate)


def _write_checkpoint(restored: RestoredRun, folder: Path, collate: MultimodalCollator) -> int:
    merge_lora(restored.model)
    # The files hold no more than this, so that both sides of the comparison are the same function.
    as_trained(restored.model, DTYPES[restored.recipe.model.dtype])
    weights = dict(restored.model.named_parameters())
    sizes = {name: weight.numel() for name, weight in weights.items()}
    _write_weights(restored.recipe, weights.items(), sizes, folder, collate)
    files = WeightFiles(folder)
    for name, tensor in files.read({name: tuple(map(slice, shape)) for name, shape in files.shapes.items()}):
        expect_equal(name, tensor.float(), weights[name])
    return len(weights)


def _write_adapter(recipe: Recipe, adapter: dict[str, Tensor], folder: Path, collate: MultimodalCollator) -> int:
    assert isinstance(recipe.tune, LoraTune)
    write_adapter(adapter, folder, tune=recipe.tune, base=recipe.model.public_name, dtype=DTYPES[recipe.model.dtype])
    _copy_companions(recipe, folder, collate)
    return len(adapter)


def _copy_companions(recipe: Recipe, folder: Path, collate: MultimodalCollator) -> None:
    """Write tokenizer, template and processors with the limits of images and the settings of clips that were used."""
    budgets, clips = collate.budgets, collate.budgets.clips
    limits, settings = (budgets.min_pixels, budgets.max_pixels), None
    if clips is not None:
        size = {"shortest_edge": clips.min_pixels, "longest_edge": clips.max_pixels}
        sampling = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames}
        settings = {"size": size, **sampling}
    template, _ = find_template(recipe.model.path)
    source = recipe.model.path
    copy_companions(source, folder, template=template, pixel_limits=limits, clip_settings=settings)
    base, hub_id, is_adapter = recipe.model.public_name, recipe.model.hub_id, (folder / ADAPTER_CONFIG).is_file()
    write_card(folder, name=recipe.name, base=base, hub_id=hub_id, is_adapter=is_adapter)
