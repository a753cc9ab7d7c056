"""Consistency checks across ranks: the run folder, the base weights, the data, and the plan of every step."""

import hashlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.hf import WeightFiles
from qwen3vl_train.dist.ranks import Ranks

FOLDER_WAIT_SECONDS = 30.0  # NFS may show a folder as it was up to 30 s ago (its acdirmin)
DataContents = list[tuple[str, dict[str, Any]]]
"""Names of what the data is made of, and what must be equal of each, as JSON."""


class StepStatus(NamedTuple):
    """What every rank must know before a step, each true where it is true on any rank."""

    failed: bool  # a rank could not get its packs
    plan_differs: bool
    has_rejects: bool  # rows of the step cannot be used
    stop_requested: bool
    save_failed: bool

    @classmethod
    def reduce(
        cls, ranks: Ranks, *, plan_hash: int | None, has_rejects: bool, stop_requested: bool, save_failed: bool
    ) -> "StepStatus":
        """Combine the status of all ranks in one message. Every rank must call it.

        plan_hash: of this rank's plan, exact as a float; None where the rank failed.
        """
        hashes = [-math.inf, -math.inf] if plan_hash is None else [plan_hash, -plan_hash]
        flags = [plan_hash is None, has_rejects, stop_requested, save_failed]
        *flags, highest, negated_lowest = ranks.reduce([*flags, *hashes], "max")
        failed, has_rejects, stop_requested, save_failed = map(bool, flags)
        return cls(failed, highest != -negated_lowest, has_rejects, stop_requested, save_failed)


def plan_error(step: int, hashes: Sequence[Sequence[int]]) -> RuntimeError:
    """Return the error that names the ranks that have planned a step differently.

    hashes: of every rank, its position in the data and its packs.
    """
    different = [rank for rank, of_rank in enumerate(hashes) if of_rank != hashes[0]]
    moved = hashes[different[0]][0] != hashes[0][0]
    what = "are at another position in the data" if moved else "have planned other samples"
    named = ", ".join(map(str, different[:20])) + (f" and {len(different) - 20} more" if len(different) > 20 else "")
    return RuntimeError(
        f"step {step}: ranks {named} {what} than rank 0, so samples would be skipped or trained twice; no weight was "
        "changed. Give all machines the same files and the same versions, and start again from the last checkpoint"
    )


def check_same_data(contents: DataContents, ranks: Ranks) -> None:
    """Raise ValueError on every rank where the data differs, with the first differences. Every rank must call it."""
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    of_main = ranks.on_main(lambda: contents)
    differences = ranks.gather(None if contents == of_main else _difference(contents, of_main))
    lines = [f"\n  - rank {rank}: {text}" for rank, text in enumerate(differences) if text is not None]
    raise ValueError(
        f"data: {len(lines)} of {ranks.world_size} ranks do not have the data of rank 0; give all machines the same "
        "files" + "".join(lines[:3])
    )


def _difference(contents: DataContents, of_main: DataContents) -> str:
    for (name, content), (name_on_main, content_on_main) in zip(contents, of_main, strict=False):
        if name != name_on_main:
            return f"{name} where rank 0 has {name_on_main}"
        for key, value in content_on_main.items():
            if content.get(key) != value:
                return f"{name}: {key} {str(content.get(key))[:80]}, on rank 0 {str(value)[:80]}"
    return f"{len(contents) - 1} files, on rank 0 {len(of_main) - 1}"


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Check that every rank sees what rank 0 writes next to the run folder. Every rank must call it.

    Raises ValueError on all ranks, naming those that see another disk: each would save its own shards there.
    """
    if ranks.world_size == 1:
        return
    token = ranks.on_main(lambda: _write_token(folder))
    deadline = time.monotonic() + FOLDER_WAIT_SECONDS
    # Listed, not opened: a network file system would remember that the name does not exist.
    while not (seen := folder.parent.is_dir() and token in os.listdir(folder.parent)) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = ranks.gather((seen, socket.gethostname()))
    if ranks.is_main:
        (folder.parent / token).unlink()
    if blind := [f"rank {rank} on {host}" for rank, (saw, host) in enumerate(hosts) if not saw]:
        raise ValueError(
            f"{folder}: what rank 0 on {hosts[0][1]} writes there is not seen by {', '.join(blind)}; let output_dir be "
            "on a disk that all machines share, under the same path"
        )


def _write_token(folder: Path) -> str:
    token = f".{folder.name}.{uuid.uuid4().hex}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / token).touch()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from error
    return token


def check_same_weights(model_path: str, ranks: Ranks) -> int:
    """Compare the base weights of all ranks and return their `WeightFiles.fingerprint`. Every rank must call it.

    Raises ValueError on all ranks, naming those whose model folder is unreadable, or differs from that of rank 0.
    """
    try:
        Qwen3VLArch.from_pretrained(model_path)  # what is wrong with the folder as a whole is said first
        fingerprint, error = WeightFiles(model_path).fingerprint(), None
    except (ValueError, OSError) as caught:
        if ranks.world_size == 1:
            raise
        fingerprint, error = 0, str(caught)
    found = ranks.gather((error, fingerprint, socket.gethostname()))
    for rank, (message, _, host) in enumerate(found):
        if message:
            raise ValueError(f"rank {rank} on {host}: {message}")
    if others := [f"rank {rank} on {host}" for rank, (_, print_, host) in enumerate(found) if print_ != found[0][1]]:
        raise ValueError(
            f"{model_path}: {', '.join(others)} {'has' if len(others) == 1 else 'have'} other weights there than rank "
            f"0 on {found[0][2]}; copy one model folder to all machines, or share it"
        )
    return fingerprint
