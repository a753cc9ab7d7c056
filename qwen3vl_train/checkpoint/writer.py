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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen3vl_train.checkpoint.atomic import finish, flush, start_aside
from qwen3vl_train.checkpoint.manifest import (
    KeepPolicy,
    Sums,
    checkpoint_folder,
    latest_checkpoint,
    prune,
    sum_files,
    write_manifest,
)
from qwen3vl_train.dist.ranks import Ranks


class CheckpointWriter:
    """Writes one checkpoint at a time beside the training.

    Every rank has one and calls its methods at the same steps. A with-block: whatever ends it, a write under way is let
    finish, so that the checkpoint it makes is there for the next start; if that write failed, the error that ends the
    block carries a note of it. timeout_seconds: how long ranks wait for each other while they write. tell: where to say
    what went wrong without harm.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        policy: KeepPolicy,
        *,
        timeout_seconds: float = 1800.0,
        report: Callable[[str], None] = print,
    ) -> None:
        self._run_dir, self._ranks, self._policy, self._report = run_dir, ranks, policy, report
        self._group: Any = None
        if ranks.world_size > 1:
            # Its messages go between threads of their own, so they must not share a group with those of the training.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._stall_seconds = 0.0
        self.last_step: int | None = None
        """The step of the last checkpoint started."""

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        fault = self._pending.exception() if self._pending else None
        if fault is not None:
            if error is None:
                raise fault
            error.add_note(str(fault))

    def start(self, step: int, state_tensors: Callable[[], dict[str, Tensor]], record: dict[str, Any]) -> None:
        """Copy the tensors and begin to write them. Waits first for a checkpoint still being written.

        Raises RuntimeError, on all ranks, where that one failed.

        state_tensors: returns shards of sharded tensors on every rank, or full ones, which rank 0 writes alone.
        record: what the manifest holds beside the step and the files.
        """
        started = time.perf_counter()
        self.wait()
        self.last_step = step
        tensors = state_tensors()
        folder = checkpoint_folder(self._run_dir, step)
        try:
            aside = self._ranks.on_main(lambda: _start(folder))
        except ValueError as error:
            raise RuntimeError(self._refused(folder, error)) from error
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if sharded or self._ranks.is_main:
            staged = {name: _copied(tensor) for name, tensor in tensors.items()}
            self._pending = self._thread.submit(self._write, staged, sharded, aside, folder, {"step": step, **record})
        self._stall_seconds += time.perf_counter() - started

    def pop_stall_seconds(self) -> float:
        """Return how long training waited in `start` since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    def _write(
        self, staged: dict[str, Tensor], sharded: bool, aside: Path, folder: Path, record: dict[str, Any]
    ) -> None:
        try:
            sums = _dcp_save(staged, aside / "state", self._group if sharded else None)
            if self._ranks.is_main:
                write_manifest(aside, record, sums)
                flush(aside / "state")
                finish(aside, folder)
        except (OSError, SafetensorError) as error:
            if self._ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise RuntimeError(self._refused(folder, error)) from error
        if self._ranks.is_main:
            try:
                prune(self._run_dir, self._policy)
            except OSError as error:  # the new checkpoint is complete: the run goes on
                self._report(
                    f"an older checkpoint could not be removed ({error}); it is tried again after the next save"
                )

    def _refused(self, folder: Path, error: Exception) -> str:
        try:
            last = latest_checkpoint(self._run_dir)
        except OSError:  # the same fault: whoever cannot write there may not be let in at all
            return f"{folder}: could not be saved ({error}); make the folder writable, then start the run again"
        then = f"the run goes on from {last}, which is whole" if last else "the run starts again, it has no checkpoint"
        return f"{folder}: could not be saved ({error}); make room, then {then}"

    def failed(self) -> bool:
        """Whether this rank's part in the write under way has ended in an error, which `wait` raises on all ranks."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until everything started is on disk, by whichever rank. Every rank must call it.

        Raises RuntimeError, the same on all ranks, where the disk refused one of them (full, read-only).
        """
        error = self._pending.exception() if self._pending else None
        fault = None if error is None else str(error) if isinstance(error, RuntimeError) else repr(error)
        faults = [told for told in self._ranks.gather(fault) if told is not None]
        self._pending = None
        if faults:
            raise RuntimeError(faults[0]) from error


def _start(folder: Path) -> Path:
    try:
        return start_aside(folder)
    except OSError as error:
        raise ValueError(str(error)) from error


def _copied(tensor: Tensor) -> Tensor:
    # On a GPU, torch's staging copies to the host; on the CPU it would keep the tensor itself, which the next step
    # changes.
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu", copy=True)


def _dcp_save(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> Sums:
    """Write this rank's pieces, or without a group all there is; returns, on rank 0, the sums of all ranks' files.

    Where the disk refuses one rank, all raise its error.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(HuggingFaceStorageWriter):
        """Flushes the files, as all of torch's writers do, and sums them: each rank its own, while others do theirs."""

        def write_data(self, *arguments: Any) -> Any:
            results = super().write_data(*arguments)
            results.wait()
            names = sorted({result.storage_data.relative_path for result in results.value()})
            sums.update(sum_files(folder.parent, [folder / name for name in names]))
            return results

    sums: Sums = {}
    writer = Writer(str(folder), save_distributed=True)
    _hush()
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception: it wraps what happened, by rank
        raise next(iter(error.failures.values()))[0] from None
    if group is None:
        return sums
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(sums, gathered, dst=0, group=group)
    return {name: entry for of_rank in gathered or [] for name, entry in of_rank.items()}


def _hush() -> None:
    """torch warns of saving in a single process, which is what is meant here.

    For good, not for the time of a save: `warnings.catch_warnings` in one thread would undo what others change.
    """
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process")


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
    _hush()
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
    _hush()
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=True)
    return tensors
