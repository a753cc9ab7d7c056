"""Die here, be slow there, fill the disk: every address in our code that a test replaces is in this file.

What a function replaces stays so until the test ends (`conftest.py` calls `undo`), in this process and in those that it
forks. Scripts for launchers import this module too. Steps are counted from one, as the metrics count them.
"""

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.checkpoint import folder_lock, manifest, writer
from qwen3vl_train.checkpoint.manifest import latest_checkpoint
from qwen3vl_train.checkpoint.writer import CheckpointWriter
from qwen3vl_train.data import signatures
from qwen3vl_train.data.encode.tokenizer import ChatTokenizer
from qwen3vl_train.data.media import frames, remote
from qwen3vl_train.data.packing import index_cache, loader, packs
from qwen3vl_train.data.sources import files, jsonl, spans
from qwen3vl_train.dist.watchdog import Watchdog
from qwen3vl_train.model import loss
from qwen3vl_train.parallel import ddp
from qwen3vl_train.parallel.optim import MasterAdamW
from qwen3vl_train.tracking import recorder
from qwen3vl_train.tracking.metrics import MetricsLog
from qwen3vl_train.tracking.wandb import SilentTracker
from qwen3vl_train.train import consistency, loop
from qwen3vl_train.train.export import files as export_files
from qwen3vl_train.train.export import memory

_patches = pytest.MonkeyPatch()


def undo() -> None:
    """Take back everything that was replaced in this process."""
    _patches.undo()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _around(owner: Any, name: str, before: Callable[..., Any] = _nothing, after: Callable[..., Any] = _nothing) -> None:
    """Call before and after, with the arguments of the call, around every call of a function or method."""
    function = getattr(owner, name)

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        result = function(*arguments, **options)
        after(*arguments, **options)
        return result

    _patches.setattr(owner, name, wrapped)


# ---- the process and its disk


def kill_self() -> None:
    """End this process as a power cut would: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(num_bytes: int) -> None:
    """Let no file of this process grow beyond num_bytes: a write ends in an OSError in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def refuse_file_locks() -> None:
    """Let the file system have no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    for name in ("lockf", "flock"):
        _patches.setattr(folder_lock.fcntl, name, refuse)


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# ---- training steps


def fill_disk_of_metrics() -> None:
    """Let the disk that holds metrics.jsonl be full from the start, and no other."""
    _around(recorder, "MetricsLog", before=lambda path: path.symlink_to("/dev/full"))


def around_steps(before: Callable[[int], Any] = _nothing, after: Callable[[int, list], Any] = _nothing) -> None:
    """Call before(step) and after(step, packs of this rank) around every training step."""
    _around(
        loop,
        "train_step",
        before=lambda *_, step, **__: before(step + 1),
        after=lambda model, optimizer, share, *_, step, **__: after(step + 1, share.packs),
    )


def before_data(act: Callable[[], Any]) -> None:
    """Call act() before a run opens its data."""
    _around(loop, "open_data", before=lambda *_, **__: act())


def before_steps(act: Callable[[], Any]) -> None:
    """Call act() before every training step."""
    around_steps(before=lambda _: act())


def kill_after_metrics_of(step: int) -> None:
    """Kill this process the moment the metrics of a step are on disk."""
    _around(MetricsLog, "append", after=lambda log, row: kill_self() if row["step"] == step else None)


def slow_optimizer_state(seconds: float) -> None:
    """Let the optimizer take so long to return its state."""
    _around(MasterAdamW, "state_tensors", before=lambda *_: time.sleep(seconds))


def note_heartbeats() -> list[int]:
    """Return a list that collects the step of every heartbeat; none is sent."""
    steps: list[int] = []
    _patches.setattr(Watchdog, "heartbeat", lambda watch, step: steps.append(step))
    return steps


def track_with(open_tracker: Callable[..., Any]) -> None:
    """Let runs of this process open this tracker."""
    _patches.setattr(recorder, "open_tracker", open_tracker)


def note_tracker_exit_codes() -> list[int]:
    """Return a list that collects the exit codes that trackers are closed with."""
    codes: list[int] = []
    _patches.setattr(SilentTracker, "finish", lambda tracker, code=0: codes.append(code))
    return codes


def see_no_files_of_others() -> None:
    """Let this rank see no file that another one writes into the folder of the run."""
    _patches.setattr(consistency.os, "listdir", lambda _: [])


def look_for_folder(seconds: float) -> None:
    """Let this rank look for the folder of the run for so many seconds."""
    _patches.setattr(consistency, "FOLDER_WAIT_SECONDS", seconds)


# ---- the lock of the run folder


def set_lock_times(*, poll: float | None = None, stale: float | None = None, heartbeat: float | None = None) -> None:
    """Set the seconds between two looks at a lock, those after which it is stale, those between two renewals."""
    for name, value in (("POLL_SECONDS", poll), ("STALE_SECONDS", stale), ("HEARTBEAT_SECONDS", heartbeat)):
        if value is not None:
            _patches.setattr(folder_lock, name, value)


# ---- checkpoints


def around_saves(
    before: Callable[[CheckpointWriter, int], Any] = _nothing, after: Callable[[CheckpointWriter, int], Any] = _nothing
) -> None:
    """Call before(writer, step) and after(writer, step) around the start of every checkpoint."""
    calls = [lambda writer, step, *_, act=act: act(writer, step) for act in (before, after)]
    _around(CheckpointWriter, "start", *calls)


def finish_saves(*steps: int) -> None:
    """Let training continue only after the checkpoints of these steps (of all, if none is named) are on disk.

    On a busy machine a kill soon after the start of a save would otherwise come before its end.
    """
    around_saves(after=lambda writer, step: writer.wait() if not steps or step in steps else None)


def _is_of(step: int) -> Callable[..., bool]:
    return lambda path, *_, **__: f"step-{step:08d}" in str(path)


# Moments of the save of a checkpoint: the function, before or after it, and for a step, which of its calls it is.
SAVE_MOMENTS: dict[str, tuple[Any, str, str, Callable[[int], Callable[..., bool]]]] = {
    "before the save": (CheckpointWriter, "start", "before", lambda step: lambda _, saved, *__: saved == step),
    "folder made": (writer, "start_partial", "after", _is_of),
    "before the manifest": (writer, "write_manifest", "before", _is_of),
    "before the rename": (Path, "rename", "before", _is_of),
    "after the rename": (Path, "rename", "after", _is_of),
    "older one half removed": (
        shutil, "rmtree", "before", lambda step: lambda path, **_: str(path).endswith(".removed"),
    ),
    "after the save": (
        writer, "prune", "after", lambda step: lambda run, _: _is_of(step)(latest_checkpoint(run)),
    ),
}  # fmt: skip


def kill_in_save(moment: str, step: int) -> None:
    """Kill this process at one of SAVE_MOMENTS in the save of a step."""
    owner, name, when, is_call = SAVE_MOMENTS[moment]
    is_it = is_call(step)
    _around(owner, name, **{when: lambda *arguments, **options: is_it(*arguments, **options) and kill_self()})


def kill_within_removal() -> None:
    """Kill this process after the first file of a checkpoint is removed."""
    _patches.setattr(shutil, "rmtree", lambda folder: ((folder / "checkpoint.json").unlink(), kill_self()))


def refuse_removal(refuses: Callable[[], bool]) -> None:
    """Let the disk refuse to remove older checkpoints while refuses() is true."""

    def refuse(path: Path, **_: Any) -> None:
        if refuses() and path.name.endswith(".removed"):
            raise PermissionError(13, "Permission denied", str(path))

    _around(shutil, "rmtree", before=refuse)


def before_checksums(act: Callable[[Path, list[Path]], Any]) -> None:
    """Call act(folder, files) when this rank has written its files of a checkpoint, before it sums them."""
    _around(writer, "checksum_files", before=act)


def note_checkpoint_files() -> dict[str, list[str]]:
    """Return two lists that collect the names of files this process sums up ("summed") and flushes ("flushed")."""
    seen: dict[str, list[str]] = {"summed": [], "flushed": []}
    _around(manifest, "_crc32", before=lambda file: seen["summed"].append(file.name))
    name_of = "/proc/self/fd/{}".format
    _around(os, "fsync", before=lambda file: seen["flushed"].append(Path(os.readlink(name_of(file))).name))
    return seen


def fail_checksums_of(folder: Path) -> None:
    """Let the disk fail where files of this folder are summed up."""

    def fail(file: Path) -> None:
        if file.is_relative_to(folder):
            raise OSError(5, "Input/output error")

    _around(manifest, "_crc32", before=fail)


def set_checksum_block(num_bytes: int) -> None:
    """Read so many bytes at once where files are summed up."""
    _patches.setattr(manifest, "BLOCK", num_bytes)


def hold_writes(checkpoints: CheckpointWriter, seconds: float = 600) -> threading.Event:
    """Keep the thread that writes checkpoints from beginning, until the returned event is set."""
    gate = threading.Event()
    checkpoints._thread.submit(gate.wait, seconds)
    return gate


def refuse_writes(checkpoints: CheckpointWriter) -> None:
    """Let the disk be full for this writer."""
    _patches.setattr(checkpoints, "_write", _no_space)


def refuse_rename() -> None:
    """Let the disk refuse to give a written checkpoint its name."""
    _patches.setattr(writer, "finish_partial", _no_space)


def refuse_folders() -> None:
    """Let the disk refuse every new folder."""
    _patches.setattr(Path, "mkdir", _no_space)


# ---- exports


def before_export_in_training(act: Callable[[Path], Any]) -> None:
    """Call act(folder) before a run that trains writes an export."""
    _around(loop, "export_while_training", before=lambda recipe, model, out, ranks: act(out))


def after_export_weights(act: Callable[[Path], Any]) -> None:
    """Call act(folder) after the weights of an export are written."""
    _around(export_files, "write_huggingface", after=lambda weights, shapes, folder, **_: act(folder))


def after_export_companions(act: Callable[[Path], Any]) -> None:
    """Call act(folder) after the files beside the weights of an export are written."""
    _around(export_files, "copy_companions", after=lambda source, folder, **_: act(folder))


def set_free_memory(num_bytes: int) -> None:
    """Let an export believe that so much memory is free."""
    _patches.setattr(memory, "available_bytes", lambda: num_bytes)


# ---- data


def kill_at_row(number: int) -> None:
    """Kill the process that builds samples, at the row of this number (counted from zero) that it builds."""
    built = iter(range(number + 1))
    _around(packs.PackBuilder, "__call__", before=lambda *_: next(built) == number and kill_self())


def note_planned_windows() -> list[tuple[int, int]]:
    """Return a list that collects (epoch, number of families) of every window that is planned."""
    windows: list[tuple[int, int]] = []
    _around(
        loader.Loader,
        "_plan",
        before=lambda train, window, carry_over: windows.append((window.epoch, len(window.families))),
    )
    return windows


def replace_first_part(train: Any, part: Any) -> None:
    """Let a loader of streams read its first part from here."""
    mixture = train.producer._reader.mixture
    mixture.parts = [part, *mixture.parts[1:]]


def refuse_to_tokenize(num_characters: int) -> None:
    """Fail where a text of so many characters or more is tokenised to count its tokens."""

    def check(tokenizer: ChatTokenizer, text: str) -> None:
        assert len(text) < num_characters, "tokenised"

    _around(ChatTokenizer, "count", before=check)


def call_disk_slow_after(seconds: float) -> None:
    """Take a file system for a slow one where a file's size and time take so long."""
    _patches.setattr(signatures, "_SLOW_SECONDS", seconds)


def after_index_arrays(act: Callable[[], Any]) -> None:
    """Call act() once, after the arrays of an index are written and before its file has its name."""
    calls = iter([act])
    _around(index_cache.np, "savez", after=lambda *_, **__: next(calls, _nothing)())


def before_unpacking(act: Callable[[Path], Any]) -> None:
    """Call act(file) before a packed file of rows is unpacked."""
    _around(files, "open_compressed", before=act)


def set_row_limits(*, block: int | None = None, row: int | None = None, unpacked: int | None = None) -> None:
    """Read files of rows in blocks of so many bytes; refuse a row that is longer, or a file that unpacks to more."""
    if unpacked is not None:
        _patches.setattr(files, "MIN_UNPACKED_BYTES", unpacked)
    if block is not None:
        _patches.setattr(jsonl, "_BLOCK", block)
    if row is not None:
        for module in (jsonl, spans):
            _patches.setattr(module, "MAX_ROW_BYTES", row)


def set_download_limits(
    *, pauses: tuple[float, ...] | None = None, num_bytes: int | None = None, seconds: float | None = None
) -> None:
    """Set the pauses between tries, the largest download and the longest one."""
    for name, value in (("RETRY_DELAYS_SECONDS", pauses), ("MAX_BYTES", num_bytes), ("TIMEOUT_SECONDS", seconds)):
        if value is not None:
            _patches.setattr(remote, name, value)


def note_decoded_packets() -> list[int]:
    """Return a list that collects how many packets each call feeds to a decoder; -1: it decodes the whole file."""
    fed: list[int] = []
    _around(
        frames,
        "_decode_groups",
        before=lambda file, packets, index_at, convert: fed.append(sum(frames._needed_packets(packets, set(index_at)))),
    )
    _around(frames, "_decode_all", before=lambda *_: fed.append(-1))
    return fed


# ---- sizes of chunks


def set_loss_chunk(num_elements: int) -> None:
    """Let one chunk of logits hold so many elements."""
    _patches.setattr(loss, "CHUNK_ELEMENTS", num_elements)


def set_gradient_bucket(num_elements: int) -> None:
    """Sum gradients over the ranks in buckets of so many elements."""
    _patches.setattr(ddp, "BUCKET_ELEMENTS", num_elements)
