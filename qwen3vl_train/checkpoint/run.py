"""The tensors that a run resumes from, through torch's distributed checkpoint: every rank writes and reads its own
pieces.

Only what trains is stored, in one neutral form whatever the engine: float32 weights and moments by name. The rest is in
the model folder that the recipe names. The files are safetensors: no pickle is written or read. Random numbers need no
state, each pack's are a function of seed, step and place in the step. A checkpoint is written while training goes on;
the step waits only until its tensors are copied.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen3vl_train.checkpoint.files import finish, start_aside
from qwen3vl_train.checkpoint.manifest import (
    KeepPolicy,
    checkpoint_folder,
    latest_checkpoint,
    prune,
    write_manifest,
)
from qwen3vl_train.dist import Ranks


class CheckpointWriter:
    """Writes one checkpoint at a time beside the training.

    Every rank has one and calls its methods at the same steps. A with-block: whatever ends it, a write under way is let
    finish, so that the checkpoint it makes is there for the next start.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, policy: KeepPolicy) -> None:
        self._run_dir, self._ranks, self._policy = run_dir, ranks, policy
        # Its messages go between threads of their own, so they must not share a group with those of the training.
        self._group: Any = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def start(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> float:
        """Copy the tensors and begin to write them; returns the seconds that the caller waited.

        tensors: pieces of sharded tensors from every rank, or whole ones, which rank 0 writes alone. A checkpoint still
        being written is waited for first. Raises RuntimeError where that one failed.
        """
        started = time.perf_counter()
        self.wait()
        folder = checkpoint_folder(self._run_dir, step)
        try:
            aside = self._ranks.from_main(lambda: _start(folder))
        except ValueError as error:
            raise RuntimeError(self._refused(folder, error)) from error
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if sharded or self._ranks.is_main:
            staged = {name: _copied(tensor) for name, tensor in tensors.items()}
            self._pending = self._thread.submit(self._write, staged, sharded, aside, folder, {"step": step, **record})
        return time.perf_counter() - started

    def _write(
        self, staged: dict[str, Tensor], sharded: bool, aside: Path, folder: Path, record: dict[str, Any]
    ) -> None:
        try:
            _dcp_save(staged, aside / "state", self._group if sharded else None)
            if self._ranks.is_main:
                write_manifest(aside, record)
                finish(aside, folder)
                prune(self._run_dir, self._policy)
        except (OSError, SafetensorError) as error:
            if self._ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise RuntimeError(self._refused(folder, error)) from error

    def _refused(self, folder: Path, error: Exception) -> str:
        try:
            last = latest_checkpoint(self._run_dir)
        except OSError:  # the same fault: whoever cannot write there may not be let in at all
            return f"{folder}: could not be saved ({error}); make the folder writable, then start the run again"
        then = f"the run goes on from {last}, which is whole" if last else "the run starts again, it has no checkpoint"
        return f"{folder}: could not be saved ({error}); make room, then {then}"

    def failed(self) -> bool:
        """Whether the write that was under way has ended in an error, which `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until everything started is on disk. Raises RuntimeError where the disk refused (full, read-only)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def _start(folder: Path) -> Path:
    try:
        return start_aside(folder)
    except OSError as error:
        raise ValueError(str(error)) from error


def _copied(tensor: Tensor) -> Tensor:
    # On a GPU, torch's staging copies to the host; on the CPU it would keep the tensor itself, which the next step
    # changes.
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu", copy=True)


def _dcp_save(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.mkdir(exist_ok=True)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
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


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, in place; of sharded ones each rank reads its pieces, however they were cut when
    written.

    Every rank must call it. Raises ValueError where the names or shapes are others than those stored.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = _stored_shapes(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(set(wanted) ^ set(stored)) or [name for name, shape in wanted.items() if stored[name] != shape]
    if wrong:
        raise ValueError(f"{folder}: holds another set of trained tensors, e.g. {wrong[0]}; was `tune` changed?")
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with _quiet():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=not sharded)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = HuggingFaceStorageReader(str(folder / "state")).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged ({error}); remove this checkpoint to resume from the one before") from None
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint whose names begin with prefix, whole, to the CPU.

    `weight/` leaves out the moments.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    shapes = {name: shape for name, shape in _stored_shapes(folder).items() if name.startswith(prefix)}
    tensors: dict[str, Any] = {name: torch.empty(shape) for name, shape in shapes.items()}
    with _quiet():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=True)
    return tensors
