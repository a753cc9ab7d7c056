"""What a run resumes from: the trained tensors, their optimizer moments, and a small record; one folder a checkpoint.

    checkpoints/step-00000200/
        state/*.safetensors      float32 weights and moments of what trains, written by torch's distributed checkpoint
        checkpoint.json          step, loader state, sizes of all files; written last

Only what trains is stored: the rest is in the model folder that the recipe names. No pickle is written or read. Random
numbers need no state: each pack's are a function of seed, step and place in the step.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from qwen3vl_train.checkpoint.files import replacing

RECORD = "checkpoint.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], keep_last: int
) -> Path:
    """Write a checkpoint aside, rename it into place, then remove all but the newest `keep_last`.

    Raises RuntimeError when the disk refuses (full, read-only); the checkpoints before it are untouched.
    """
    folder = checkpoint_folder(run_dir, step)
    try:
        with replacing(folder) as aside:
            _dcp_save(tensors, aside / "state")
            sizes = {str(file.relative_to(aside)): file.stat().st_size for file in sorted((aside / "state").iterdir())}
            (aside / RECORD).write_text(
                json.dumps({"step": step, **record, "files": sizes}, indent=1), encoding="utf-8"
            )
    except (OSError, SafetensorError) as error:
        last = latest_checkpoint(run_dir)
        then = f"the run goes on from {last}, which is whole" if last else "the run starts again, it has no checkpoint"
        raise RuntimeError(f"{folder}: could not be saved ({error}); make room, then {then}") from error
    for old in _checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return folder


def _dcp_save(tensors: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.mkdir()
    # Every rank holds the same tensors, so the caller alone writes: no collective takes part.
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer, no_dist=True)
    except CheckpointException as error:  # not an Exception: it wraps what happened, by rank
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of saving in a single process, which is what is meant here."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            yield
    finally:
        logger.setLevel(level)


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step-*") if (folder / RECORD).is_file())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none.

    A half-written one has another name and is never chosen.
    """
    folders = _checkpoints(run_dir)
    return folders[-1] if folders else None


def read_record(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's record.

    Raises ValueError where it is unreadable or a file of the checkpoint is missing or cut short.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes: dict[str, int] = record["files"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / RECORD}: unreadable ({error}); remove this checkpoint to resume from the one before"
        ) from None
    for name, size in sizes.items():
        file = folder / name
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            state = "missing" if got is None else f"{got} bytes, written with {size}"
            raise ValueError(f"{file}: {state}; remove this checkpoint to resume from the one before")
    return record


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint to the CPU. Raises ValueError where its files are damaged."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        entries = HuggingFaceStorageReader(str(folder / "state")).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _quiet():
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=True)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise ValueError(f"{folder}: damaged ({error}); remove this checkpoint to resume from the one before") from None
    return tensors
