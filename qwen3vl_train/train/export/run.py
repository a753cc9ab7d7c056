"""Export of one checkpoint of a run: a PEFT adapter or a full checkpoint, checked before it is there."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.checkpoint.adapter import adapter_tensors
from qwen3vl_train.checkpoint.atomic import atomic_folder
from qwen3vl_train.config import LoraTune, Recipe
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.model.lora import merge_lora
from qwen3vl_train.model.new_rows import modules_with_new_rows
from qwen3vl_train.model.qwen3vl import DTYPES
from qwen3vl_train.outputs import writing
from qwen3vl_train.train.build import as_trained
from qwen3vl_train.train.export.files import write_adapter_files, write_checkpoint_files
from qwen3vl_train.train.export.memory import LayersThatFit, layers_that_fit
from qwen3vl_train.train.export.verify import LogitDifference, compare_with_transformers, probe_batches
from qwen3vl_train.train.export.verify_files import compare_processing
from qwen3vl_train.train.export.weights import describe_trained, fill_trained, merged_weights, plain_shapes
from qwen3vl_train.train.load_run import FoundCheckpoint, find_checkpoint, restore_run


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    out: Path
    kind: str  # 'adapter' or 'checkpoint'
    step: int
    num_tensors: int
    difference: LogitDifference | None  # between our model and transformers with the written files; None: not compared
    notes: list[str]  # for the user


def export_run(
    run: Path,
    out: Path,
    *,
    merge: bool,
    step: int | None = None,
    best: str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write a checkpoint of a run to `out`: the adapter of LoRA, or all weights with `merge` or after full tuning.

    step, best: which checkpoint, see `find_checkpoint`; by default the newest.
    dtype: of the files, the recipe's by default.

    Both include tokenizer, template and the pixel limits that were used. Weights are written one at a time, from the
    files of base and checkpoint. The files are read back: every tensor must be bit-equal to what was written,
    transformers must make the same ids and pixels with them, and the same logits (with peft for an adapter) on probe
    conversations, of as many decoder layers as the memory holds. All arithmetic is in float32. Raises ValueError where
    `out` exists, RuntimeError, without creating `out`, where a check fails.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder or remove it")
    found = find_checkpoint(run, step=step, best=best)
    recipe, collate = found.recipe, open_collator(found.recipe)
    file_dtype = DTYPES[dtype or recipe.model.dtype]
    as_adapter = isinstance(recipe.tune, LoraTune) and not merge
    model = describe_trained(found)
    fit = layers_that_fit(model)
    probes = probe_batches(collate, _names_of_new_rows(model, collate))
    with writing(out), atomic_folder(out) as folder:
        if as_adapter:
            fill_trained(model, found)
            adapter = adapter_tensors(model)
            num_tensors = len(adapter)
            write_adapter_files(recipe, model, adapter, folder, collate, file_dtype)
            del adapter
        else:
            shapes = plain_shapes(model)
            num_tensors = len(shapes)
            write_checkpoint_files(recipe, merged_weights(model, found), shapes, folder, collate, file_dtype)
        del model
        compare_processing(folder, out, collate)
        difference = _compare_logits(found, folder, out, as_adapter, file_dtype, fit, probes)
    notes = [note for note in (found.note, fit.note, _refused_by_servers(recipe) if as_adapter else None) if note]
    return Exported(out, "adapter" if as_adapter else "checkpoint", found.step, num_tensors, difference, notes)


def _names_of_new_rows(model: nn.Module, collate: MultimodalCollator) -> list[str]:
    added = collate.tokenizer.added_tokens
    return [added[token] for _, table in modules_with_new_rows(model) for token in table.new_ids if token in added]


def _refused_by_servers(recipe: Recipe) -> str | None:
    """Return what servers may not take of an adapter, if there is something."""
    tune = recipe.tune
    assert isinstance(tune, LoraTune)
    parts = [f"whole modules ({', '.join(tune.full)})"] if tune.full else []
    parts += ["rows of tokens (peft 0.15 and later read them)"] if tune.new_tokens else []
    parts += ["ranks or alphas by group"] if not all(isinstance(n, int) for n in (tune.rank, tune.alpha)) else []
    if not parts:
        return None
    return f"the adapter holds {', '.join(parts)}, which peft reads and vLLM does not; export with --merge for it"


def _compare_logits(
    found: FoundCheckpoint,
    folder: Path,
    out: Path,
    as_adapter: bool,
    dtype: torch.dtype,
    fit: LayersThatFit,
    batches: list[PackedBatch],
) -> LogitDifference | None:
    """Compare our model with transformers on the written files, one model in memory at a time."""
    if fit.num_layers == 0:
        return None
    ours = _our_logits(found, as_adapter, dtype, fit.num_layers, batches)
    base, adapter = (Path(found.recipe.model.path), folder) if as_adapter else (folder, None)
    base_dtype = DTYPES[found.recipe.model.dtype] if as_adapter else dtype
    difference = compare_with_transformers(
        ours, batches, checkpoint=base, dtype=base_dtype, adapter=adapter, num_layers=fit.num_layers
    )
    if not difference.within_tolerance:
        raise RuntimeError(
            f"{out}: not written; transformers computes other logits from it (difference {difference.largest:.2e}, "
            f"standard deviation of the logits {difference.std:.2f}); please report it"
        )
    return difference


@torch.no_grad()
def _our_logits(
    found: FoundCheckpoint, as_adapter: bool, dtype: torch.dtype, num_layers: int | None, batches: list[PackedBatch]
) -> list[Tensor]:
    """Return our logits from what the files hold: here a whole model is merged, in the files layer by layer."""
    model = restore_run(found, dtype=torch.float32, num_layers=num_layers).model
    if as_adapter:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
    else:
        merge_lora(model)
        as_trained(model, dtype)
    return [model.logits(batch) for batch in batches]
