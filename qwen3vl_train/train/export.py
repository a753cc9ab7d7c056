"""Export of a run: a PEFT adapter or a full checkpoint, checked by loading it into stock transformers."""

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.checkpoint.atomic import atomic_folder
from qwen3vl_train.checkpoint.hf import WeightFiles, copy_companions, write_huggingface
from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import full_tensor, global_shape
from qwen3vl_train.model.lora import adapter_tensors, merge_lora
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.train.build import as_trained
from qwen3vl_train.train.load_run import RestoredRun, restore_run
from qwen3vl_train.train.verify import LogitDifference, compare_with_transformers, probe_batches

ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
    source, dtype = recipe.model.path, DTYPES[recipe.model.dtype]
    limits, clips = _media_settings(collate)
    write_huggingface(weights, sizes, out, source=source, dtype=dtype, pixel_limits=limits, clip_settings=clips)


def _write_checkpoint(restored: RestoredRun, folder: Path, collate: MultimodalCollator) -> int:
    merge_lora(restored.model)
    # The files hold no more than this, so that both sides of the comparison are the same function.
    as_trained(restored.model, DTYPES[restored.recipe.model.dtype])
    weights = dict(restored.model.named_parameters())
    sizes = {name: weight.numel() for name, weight in weights.items()}
    _write_weights(restored.recipe, weights.items(), sizes, folder, collate)
    files = WeightFiles(folder)
    for name, tensor in files.read({name: tuple(map(slice, shape)) for name, shape in files.shapes.items()}):
        _expect_equal(name, tensor.float(), weights[name])
    return len(weights)


def _write_adapter(recipe: Recipe, adapter: dict[str, Tensor], folder: Path, collate: MultimodalCollator) -> int:
    from peft import LoraConfig

    tune, dtype = recipe.tune, DTYPES[recipe.model.dtype]
    assert isinstance(tune, LoraTune)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        base_model_name_or_path=recipe.model.path, task_type="CAUSAL_LM", inference_mode=True,
        r=tune.rank, lora_alpha=tune.alpha, lora_dropout=tune.dropout,
        # Full names: suffixes such as 'proj' would match others too.
        target_modules=sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}),
        use_rslora=tune.rslora, use_dora=tune.dora, bias="none",
    )  # fmt: skip
    config.save_pretrained(str(folder))
    # peft keeps the targets as a set: sorted, so that the same adapter gives the same file.
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["target_modules"].sort()
    file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companions(recipe.model.path, folder, *_media_settings(collate))
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        _expect_equal(name, tensor, tensors[name])
    return len(tensors)


def _media_settings(collate: MultimodalCollator) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Return pixel limits of images, and settings of clips as a video preprocessor has them (None: it has none)."""
    budgets = collate.budgets
    clips = budgets.clips
    if clips is None:
        return (budgets.min_pixels, budgets.max_pixels), None
    size = {"shortest_edge": clips.min_pixels, "longest_edge": clips.max_pixels}
    sampling = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames}
    return (budgets.min_pixels, budgets.max_pixels), {"size": size, **sampling}


def _expect_equal(name: str, written: Tensor, expected: Tensor) -> None:
    if not torch.equal(written, expected):
        raise RuntimeError(f"{name}: reads back different from what was written; check the disk")
