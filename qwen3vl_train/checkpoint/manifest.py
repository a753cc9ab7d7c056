"""Which checkpoints a run has, whether they are complete, and which are kept.

checkpoints/step-00000200/
    state/*.safetensors      float32 weights and moments of what trains
    checkpoint.json          the manifest, written last: step, loader state, versions, size and checksum of every file
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3vl_train.atomic_file import flush

MANIFEST = "checkpoint.json"
EXPORTS = "export"
OPTIMIZER_FILES = "state/*-00002-of-00002.safetensors"
"""Where the moments are in files of their own, see `KeepPolicy.optimizer`."""
BLOCK = 2**24


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints are kept: the newest keep_last, every keep_every-th step, and the best by a held-out loss.

    keep_best: name of the held-out file whose lowest loss is best; None to keep none for its loss.
    optimizer: 'last' removes the moments from those that are kept for other reasons than being the newest.
    """

    keep_last: int
    keep_every: int | None = None
    keep_best: str | None = None
    optimizer: Literal["all", "last"] = "all"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first. A partial one has another name."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step-*") if (folder / MANIFEST).is_file())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Does not check its files."""
    return next(reversed(complete_checkpoints(run_dir)), None)


FileEntries = dict[str, dict[str, int]]  # by name within the checkpoint: `bytes`, and `crc32` of the content


def checksum_files(folder: Path, files: Iterable[Path]) -> FileEntries:
    """Return size and checksum of complete files in a checkpoint's folder."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files
    }


def write_manifest(folder: Path, record: dict[str, Any], entries: FileEntries) -> None:
    """Write the manifest of a folder: a record, and the entries of its other files, which are complete and flushed."""
    content = json.dumps({**record, "files": dict(sorted(entries.items()))}, indent=1)
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(content, encoding="utf-8")
    flush(temporary)
    temporary.replace(folder / MANIFEST)


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_manifest(folder: Path, *, checksums: bool = False) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare the sizes of its files; with checksums, every byte of them.

    Raises ValueError where the manifest is unreadable, or a file is missing, cut short or altered.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["crc32"]) for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: unreadable ({error!r}); restore it, or move this checkpoint away") from None
    if missing := {"step", "updates", "loader", "rejects"} - record.keys():
        raise ValueError(f"{manifest}: has no {', '.join(sorted(missing))}; restore it, or move this checkpoint away")
    for name, (size, crc32) in files.items():
        file = folder / name
        try:
            got = file.stat().st_size if file.is_file() else None
            same = got == size and (not checksums or _crc32(file) == crc32)
        except OSError as error:  # the disk fails in the middle of a file
            raise ValueError(
                f"{file}: cannot be read ({error.strerror}); restore it, or move this checkpoint away"
            ) from None
        if got != size:
            state = "missing" if got is None else f"{got} bytes, written with {size}"
            raise ValueError(f"{file}: {state}; restore it, or move this checkpoint away")
        if not same:
            raise ValueError(
                f"{file}: its checksum is not the one it was written with; restore it, or move this checkpoint away"
            )
    return record


def choose_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose checksums are right, or None, and what is wrong with the newer ones.

    Raises ValueError where there are checkpoints and none can be resumed from.
    """
    errors: list[str] = []
    folders = complete_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            record = read_manifest(folder, checksums=True)
        except ValueError as error:
            errors.append(str(error))
            continue
        if record.get("optimizer", True):
            return folder, errors
        errors.append(f"{folder}: can be exported but not resumed from, checkpoint.keep_optimizer was last")
    if errors:
        listed = "".join(f"\n  - {error}" for error in errors)
        what = f"none of {len(folders)} checkpoints can be resumed from{listed}"
        raise ValueError(f"{run_dir}: {what}\nrestore one from a copy, or choose another name to start anew")
    return None, []


def rename_damaged(run_dir: Path, chosen: Path | None) -> None:
    """Rename the damaged checkpoints after the chosen one, so that their steps can be saved again."""
    for folder in complete_checkpoints(run_dir):
        if chosen is not None and folder.name > chosen.name:
            target = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def prune(run_dir: Path, policy: KeepPolicy) -> None:
    """Remove the checkpoints that the policy does not keep.

    Each is renamed first: one that a kill leaves half removed is not taken for a checkpoint, and is removed the next
    time. Raises OSError where the disk refuses.
    """
    folders = complete_checkpoints(run_dir)
    kept = _kept(folders, folders, policy)
    _remove(folder for folder in folders if folder not in kept)
    if policy.optimizer == "last":
        for folder in kept - set(folders[-policy.keep_last :]):
            _remove_optimizer(folder)
    _finish_removal(run_dir / "checkpoints")


def prune_exports(run_dir: Path, policy: KeepPolicy) -> None:
    """Remove the exports that a run wrote while it trained and that the policy does not keep, in the same way."""
    folders = sorted((run_dir / EXPORTS).glob("step-*"))
    kept = _kept(folders, complete_checkpoints(run_dir), policy)
    _remove(folder for folder in folders if folder not in kept)
    _finish_removal(run_dir / EXPORTS)


def _kept(folders: list[Path], checkpoints: list[Path], policy: KeepPolicy) -> set[Path]:
    """Return which of the folders, each of a step, are kept. checkpoints: in which the best is looked up."""
    kept = set(folders[-policy.keep_last :])
    if policy.keep_every:
        kept |= {folder for folder in folders if int(folder.name.removeprefix("step-")) % policy.keep_every == 0}
    if policy.keep_best and (best := best_checkpoint(checkpoints, policy.keep_best)):
        kept |= {folder for folder in folders if folder.name == best.name}
    return kept


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        target = folder.with_name(f".{folder.name}.removed")
        if target.exists():  # of the same step, saved before a resume; a rename onto it would fail
            shutil.rmtree(target)
        folder.rename(target)


def _finish_removal(parent: Path) -> None:
    for removed in parent.glob(".step-*.removed"):
        shutil.rmtree(removed)


def _remove_optimizer(folder: Path) -> None:
    """Remove the files of moments, after a manifest without them is written; one that has none is left unchanged."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.glob(OPTIMIZER_FILES)}
    record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if listed := files.keys() & record["files"].keys():
        entries = {name: entry for name, entry in record.pop("files").items() if name not in listed}
        write_manifest(folder, {**record, "optimizer": False}, entries)
    for file in files.values():  # also those that a kill has left without an entry
        file.unlink()


def best_checkpoint(folders: Iterable[Path], name: str) -> Path | None:
    """Return the checkpoint with the lowest loss on a held-out set, None where none has one."""
    known = {folder: loss for folder in folders if (loss := held_out_losses(folder).get(name)) is not None}
    return min(known, key=lambda folder: known[folder]) if known else None


def held_out_losses(folder: Path) -> dict[str, float]:
    """Return the losses of a checkpoint by held-out set; those that are not finite are none."""
    try:
        losses = read_manifest(folder).get("eval", {})
    except ValueError:
        return {}
    return {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
