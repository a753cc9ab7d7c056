"""Write and read the tensors that a run resumes from, by torch.distributed.checkpoint: each rank its own shards.

Only what trains is stored, in one form for all engines: float32 weights and moments by name. The rest is in the model
folder that the recipe names. The files are safetensors: no pickle is written or read. Random numbers need no state:
those of a pack follow from seed, step and its number in the step. A checkpoint is written while training continues; the
step waits only until its tensors are copied.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from qwen3vl_train.atomic_file import flush
from qwen3vl_train.checkpoint.atomic import finish_partial, start_partial
from qwen3vl_train.checkpoint.manifest import (
    FileEntries,
    KeepPolicy,
    checkpoint_folder,
    checksum_files,
    latest_checkpoint,
    prune,
    prune_exports,
    write_manifest,
)
from qwen3vl_train.dist.ranks import Ranks

_BATCH_BYTES = 2**28


class CheckpointWriter:
    """Write one checkpoint at a time in a thread while training continues.

    Every rank has a writer and calls its methods at the same steps. It is a context manager: whatever ends the block, a
    write under way is finished, so that its checkpoint exists at the next start; if that write failed, the error that
    ends the block has a note about it.

    timeout_seconds: how long ranks wait for each other while they write.
    report: prints what went wrong without ending the run.
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
            # The writing threads exchange messages, which must not share a process group with those of the training.
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
        failure = self._pending.exception() if self._pending else None
        if failure is not None:
            if error is None:
                raise failure
            error.add_note(str(failure))

    def start(self, step: int, state_tensors: Callable[[], dict[str, Tensor]], record: dict[str, Any]) -> None:
        """Copy the tensors and begin to write them. Waits first for a checkpoint still being written.

        Raises RuntimeError, on all ranks, where that one failed.

        state_tensors: returns shards of sharded tensors on every rank, or full ones, which rank 0 writes alone.
        record: what the manifest holds besides the step and the files.
        """
        started = time.perf_counter()
        self.wait()
        self.last_step = step
        tensors = state_tensors()
        folder = checkpoint_folder(self._run_dir, step)
        try:
            partial = self._ranks.on_main(lambda: _start(folder))
        except ValueError as error:
            raise RuntimeError(self._describe(folder, error)) from error
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if sharded or self._ranks.is_main:
            staged = {name: _copy_to_host(tensor) for name, tensor in tensors.items()}
            self._pending = self._thread.submit(self._write, staged, sharded, partial, folder, {"step": step, **record})
        self._stall_seconds += time.perf_counter() - started

    def pop_stall_seconds(self) -> float:
        """Return how long training waited in `start` since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    def _write(
        self, staged: dict[str, Tensor], sharded: bool, partial: Path, folder: Path, record: dict[str, Any]
    ) -> None:
        try:
            moments_apart = self._policy.optimizer == "last"
            entries = _dcp_save(staged, partial / "state", self._group if sharded else None, moments_apart)
            if self._ranks.is_main:
                write_manifest(partial, record, entries)
                flush(partial / "state")
                finish_partial(partial, folder)
        except (OSError, SafetensorError) as error:
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(self._describe(folder, error)) from error
        self._prune(prune, "checkpoint")

    def prune_exports(self) -> None:
        """Remove the exports that the policy does not keep. Rank 0 does it."""
        self._prune(prune_exports, "export")

    def _prune(self, prune: Callable[[Path, KeepPolicy], None], what: str) -> None:
        if self._ranks.is_main:
            try:
                prune(self._run_dir, self._policy)
            except OSError as error:  # the new one is complete: the run continues
                self._report(f"an older {what} could not be removed ({error}); it is tried again after the next save")

    def _describe(self, folder: Path, error: Exception) -> str:
        try:
            last = latest_checkpoint(self._run_dir)
        except OSError:  # the folder may be unreadable as well
            return f"{folder}: could not be saved ({error}); make the folder writable, then start the run again"
        resumes = f"the run continues from {last}, which is complete"
        then = resumes if last else "the run starts again, it has no checkpoint"
        return f"{folder}: could not be saved ({error}); make room, then {then}"

    def failed(self) -> bool:
        """Return whether this rank's part of the last write has failed; `wait` raises its error on all ranks."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until what all ranks have started is on disk. Every rank must call it.

        Raises RuntimeError, the same on all ranks, where the disk refused one of them (full, read-only).
        """
        error = self._pending.exception() if self._pending else None
        message = None if error is None else str(error) if isinstance(error, RuntimeError) else repr(error)
        messages = [message for message in self._ranks.gather(message) if message is not None]
        self._pending = None
        if messages:
            raise RuntimeError(messages[0]) from error


def _start(folder: Path) -> Path:
    try:
        return start_partial(folder)
    except OSError as error:
        raise ValueError(str(error)) from error


def _copy_to_host(tensor: Tensor) -> Tensor:
    # torch's own staging copies from a GPU, but on the CPU keeps the tensor itself, which the next step changes.
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu", copy=True)


def _dcp_save(
    tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None, moments_apart: bool
) -> FileEntries:
    """Write this rank's shards, or without a group everything; return, on rank 0, the entries of all ranks' files.

    Where the disk refuses one rank, all raise its error.

    moments_apart: put them into files of their own, those of `OPTIMIZER_FILES`.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(HuggingFaceStorageWriter):
        """Write and flush as torch's writers do, then compute checksums: each rank those of its files."""

        def write_data(self, *arguments: Any) -> Any:
            results = super().write_data(*arguments)
            results.wait()
            names = sorted({result.storage_data.relative_path for result in results.value()})
            entries.update(checksum_files(folder.parent, [folder / name for name in names]))
            return results

    entries: FileEntries = {}
    file_numbers = {name: 1 if name.startswith("weight/") else 2 for name in tensors} if moments_apart else None
    writer = Writer(str(folder), fqn_to_index_mapping=file_numbers, save_distributed=True)
    _ignore_single_process_warnings()
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception: it wraps what happened, by rank
        raise next(iter(error.failures.values()))[0] from None
    if group is None:
        return entries
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(entries, gathered, dst=0, group=group)
    return {name: entry for of_rank in gathered or [] for name, entry in of_rank.items()}


def _ignore_single_process_warnings() -> None:
    """Ignore torch's warning that a single process saves, which is intended here.

    It stays ignored: `warnings.catch_warnings` in one thread would undo what other threads change.
    """
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process")


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, in place. Each rank reads its shards, whatever the sharding was when written.

    Every rank must call it. Raises ValueError where names or shapes differ from those stored.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = _stored_shapes(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(set(wanted) ^ set(stored)) or [name for name, shape in wanted.items() if stored[name] != shape]
    if wrong:
        raise ValueError(f"{folder}: holds another set of trained tensors, e.g. {wrong[0]}; was `tune` changed?")
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    _ignore_single_process_warnings()
    load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=not sharded)


def load_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Read some weights of a checkpoint into tensors, in place; of sharded ones each rank its shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    sharded = any(isinstance(tensor, DTensor) for tensor in weights.values())
    _ignore_single_process_warnings()
    stored = {f"weight/{name}": tensor for name, tensor in weights.items()}
    load(stored, storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=not sharded)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a checkpoint. Raises ValueError where it is damaged."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = HuggingFaceStorageReader(str(folder / "state")).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged ({error}); restore it, or move this checkpoint away") from None
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the full tensors whose names begin with prefix, to the CPU. `weight/` skips the moments."""
    return dict(iter_tensors(folder, [name for name in _stored_shapes(folder) if name.startswith(prefix)]))


def iter_tensors(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of these names, in their order, to the CPU; a batch of them is in memory at a time."""
    shapes = _stored_shapes(folder) if names else {}
    batch: dict[str, Any] = {}
    num_bytes = 0
    for name in names:
        batch[name] = torch.empty(shapes[name])
        num_bytes += batch[name].nbytes
        if num_bytes >= _BATCH_BYTES:
            yield from _load(folder, batch)
            batch, num_bytes = {}, 0
    yield from _load(folder, batch)


def _load(folder: Path, tensors: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if tensors:
        _ignore_single_process_warnings()
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "state")), no_dist=True)
    while tensors:  # what has been taken is not held
        name = next(iter(tensors))
        yield name, tensors.pop(name)


def stored_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a checkpoint holds, by name. Raises ValueError where it is damaged."""
    shapes = _stored_shapes(folder).items()
    return {name.removeprefix("weight/"): shape for name, shape in shapes if name.startswith("weight/")}
