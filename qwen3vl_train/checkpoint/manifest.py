"""Which checkpoints a run has, whether they are whole, and which may go.

checkpoints/step-00000200/
    state/*.safetensors      float32 weights and moments of what trains
    checkpoint.json          the manifest: step, loader state, who wrote it, size and checksum of every file;
    written last
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_train.checkpoint.atomic import flush

MANIFEST = "checkpoint.json"
BLOCK = 2**24


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay: the newest keep_last, every keep_every-th step, and the best by a held-out loss.

    keep_best: name of the held-out set whose lowest loss is best; None for none.
    """

    keep_last: int
    keep_every: int | None = None
    keep_best: str | None = None


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Folders that were finished, oldest first. One that was being written has another name and is never among them."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step-*") if (folder / MANIFEST).is_file())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run; None where there is none. Does not look into its files."""
    folders = whole_checkpoints(run_dir)
    return folders[-1] if folders else None


Sums = dict[str, dict[str, int]]
"""Of files, by name within their checkpoint: `bytes`, and `crc32` of their content."""


def sum_files(folder: Path, files: Iterable[Path]) -> Sums:
    """Size and checksum of finished files in a checkpoint's folder."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files
    }


def write_manifest(folder: Path, record: dict[str, Any], sums: Sums) -> None:
    """Write the manifest of a folder whose other files are complete and flushed. sums: of all of these files."""
    content = json.dumps({**record, "files": dict(sorted(sums.items()))}, indent=1)
    (folder / MANIFEST).write_text(content, encoding="utf-8")
    flush(folder / MANIFEST)


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_record(folder: Path, *, checksums: bool = False) -> dict[str, Any]:
    """Read a checkpoint's manifest and hold its files against it; with checksums, every byte of them.

    Raises ValueError where it is unreadable, or a file is missing, cut short or altered.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["crc32"]) for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: unreadable ({error!r}); remove this checkpoint") from None
    if missing := {"step", "updates", "loader", "rejects"} - record.keys():
        raise ValueError(f"{manifest}: has no {', '.join(sorted(missing))}; remove this checkpoint")
    for name, (size, crc32) in files.items():
        file = folder / name
        try:
            got = file.stat().st_size if file.is_file() else None
            same = got == size and (not checksums or _crc32(file) == crc32)
        except OSError as error:  # a disk that gives up within a file
            raise ValueError(f"{file}: cannot be read ({error.strerror}); remove this checkpoint") from None
        if got != size:
            state = "missing" if got is None else f"{got} bytes, written with {size}"
            raise ValueError(f"{file}: {state}; remove this checkpoint")
        if not same:
            raise ValueError(f"{file}: its checksum is not the one it was written with; remove this checkpoint")
    return record


def choose_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole to the last byte, and what is wrong with the newer ones, if there are any.

    Raises ValueError where there are checkpoints and none is whole.
    """
    faults: list[str] = []
    folders = whole_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            read_record(folder, checksums=True)
        except ValueError as error:
            faults.append(str(error))
        else:
            return folder, faults
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise ValueError(f"{run_dir}: none of {len(folders)} checkpoints is whole{listed}")
    return None, []


def set_aside_newer(run_dir: Path, chosen: Path | None) -> None:
    """Rename the damaged checkpoints behind the chosen one, so that their steps can be saved again."""
    for folder in whole_checkpoints(run_dir):
        if chosen is not None and folder.name > chosen.name:
            target = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def prune(run_dir: Path, policy: KeepPolicy) -> None:
    """Remove the checkpoints that the policy does not keep.

    Each is renamed first: what a kill leaves half removed is no checkpoint any more, and goes the next time. Raises
    OSError where the disk refuses.
    """
    folders = whole_checkpoints(run_dir)
    kept = set(folders[-policy.keep_last :])
    if policy.keep_every:
        kept |= {folder for folder in folders if int(folder.name.removeprefix("step-")) % policy.keep_every == 0}
    if policy.keep_best:
        losses = {folder: _loss(folder, policy.keep_best) for folder in folders}
        judged = {folder: loss for folder, loss in losses.items() if loss is not None}
        if judged:
            kept.add(min(judged, key=lambda folder: judged[folder]))
    for folder in folders:
        if folder not in kept:
            target = folder.with_name(f".{folder.name}.removed")
            if target.exists():  # of the same step done before; a rename onto it would fail for good
                shutil.rmtree(target)
            folder.rename(target)
    for removed in (run_dir / "checkpoints").glob(".step-*.removed"):
        shutil.rmtree(removed)


def _loss(folder: Path, name: str) -> float | None:
    """The loss of a checkpoint on a held-out set; None where it was not evaluated, is damaged, or has no finite one."""
    try:
        loss = read_record(folder).get("eval", {}).get(name)
    except ValueError:
        return None
    return loss if loss is not None and math.isfinite(loss) else None
