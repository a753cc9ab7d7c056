"""What goes out of a run.

A PEFT adapter, or a whole checkpoint, loaded back into stock transformers before it is called done.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_train.checkpoint.files import replacing
from qwen3vl_train.checkpoint.hf import WeightFiles, copy_companions, write_huggingface
from qwen3vl_train.checkpoint.names import to_huggingface
from qwen3vl_train.config import LoraTune
from qwen3vl_train.data.collate import MultimodalCollator
from qwen3vl_train.model.lora import adapter_tensors, merge_lora
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.train.data import open_collator
from qwen3vl_train.train.restore import RestoredRun, restore_run
from qwen3vl_train.train.verify import LogitDifference, compare_with_transformers, probe_batches, probe_logits

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """kind: 'adapter' or 'checkpoint'. difference: our model in memory against the written files in transformers."""

    out: Path
    kind: str
    step: int
    num_tensors: int
    difference: LogitDifference


def export_run(run: Path, out: Path, *, merge: bool) -> Exported:
    """Write a run's newest checkpoint to `out`: the adapter of a LoRA run; with `merge`, or after full tuning, a whole
    checkpoint.

    Both carry tokenizer, template and the pixel limits that were used. The files are read back: every tensor must be
    bit-equal to what was meant, and stock transformers (and peft) must give the same logits on probe conversations. All
    arithmetic is in float32; the files have the recipe's dtype. Raises ValueError where `out` exists, RuntimeError,
    with `out` not made, where a check fails.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder or remove it")
    restored = restore_run(run, dtype=torch.float32)
    recipe, model = restored.recipe, restored.model
    as_adapter = isinstance(recipe.tune, LoraTune) and not merge
    collate = open_collator(recipe)
    batches = probe_batches(collate)
    with replacing(out) as folder:
        if as_adapter:
            num_tensors = _write_adapter(restored, folder, collate)
        else:
            num_tensors = _write_checkpoint(restored, folder, collate)
        logits = probe_logits(model, batches)
        base = Path(recipe.model.path) if as_adapter else folder
        step = restored.step
        del model, restored  # one model in memory at a time
        difference = compare_with_transformers(logits, batches, checkpoint=base, adapter=folder if as_adapter else None)
        if not difference.within_tolerance:
            raise RuntimeError(
                f"{out}: not written; transformers computes other logits from it (difference {difference.largest:.2e}, "
                f"spread of logits {difference.spread:.2f}); please report it"
            )
    return Exported(out, "adapter" if as_adapter else "checkpoint", step, num_tensors, difference)


def _dtype(restored: RestoredRun) -> torch.dtype:
    return torch.bfloat16 if restored.recipe.model.dtype == "bfloat16" else torch.float32


def _write_checkpoint(restored: RestoredRun, folder: Path, collate: MultimodalCollator) -> int:
    dtype = _dtype(restored)
    merge_lora(restored.model)
    _round_weights(restored.model, dtype)
    weights = dict(restored.model.named_parameters())
    limits, clips = _media_settings(collate)
    write_huggingface(
        weights, folder, source=restored.recipe.model.path, dtype=dtype, pixel_limits=limits, clip_settings=clips
    )
    files = WeightFiles(folder)
    for name, tensor in files.read(list(files.shapes)):
        _expect_equal(name, tensor.float(), weights[name])
    return len(weights)


@torch.no_grad()
def _round_weights(model: Qwen3VLForConditionalGeneration, dtype: torch.dtype) -> None:
    """Let the model in memory hold what the file's dtype can hold, so that both sides of the comparison are the same
    function.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _write_adapter(restored: RestoredRun, folder: Path, collate: MultimodalCollator) -> int:
    from peft import LoraConfig

    recipe, tune, dtype = restored.recipe, restored.recipe.tune, _dtype(restored)
    assert isinstance(tune, LoraTune)
    tensors = {
        name: tensor.to(dtype).contiguous() for name, tensor in adapter_tensors(restored.model, to_huggingface).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        base_model_name_or_path=recipe.model.path,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        target_modules=sorted(_adapted_modules(tensors)),
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        bias="none",
    )
    config.save_pretrained(str(folder))
    copy_companions(recipe.model.path, folder, *_media_settings(collate))
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        _expect_equal(name, tensor, tensors[name])
    return len(tensors)


def _media_settings(collate: MultimodalCollator) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Pixel limits of images, and the settings of clips as a video preprocessor has them (None: it has none)."""
    budgets = collate.encoder.budgets
    clips = budgets.clips
    if clips is None:
        return (budgets.min_pixels, budgets.max_pixels), None
    size = {"shortest_edge": clips.min_pixels, "longest_edge": clips.max_pixels}
    sampling = {"fps": clips.fps, "min_frames": clips.min_frames, "max_frames": clips.max_frames}
    return (budgets.min_pixels, budgets.max_pixels), {"size": size, **sampling}


def _adapted_modules(tensors: dict[str, Tensor]) -> set[str]:
    """Full Hugging Face names of the adapted modules.

    A list of suffixes such as 'proj' would also reach modules never trained.
    """
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}


def _expect_equal(name: str, written: Tensor, meant: Tensor) -> None:
    if not torch.equal(written, meant):
        raise RuntimeError(f"{name}: reads back different from what was written; is the disk sound?")
