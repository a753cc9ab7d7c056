"""What all ranks must hold alike: the data, and the plan of every step. Where they do not, all stop and say so."""

import hashlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from qwen3vl_train.checkpoint.hf import WeightFiles
from qwen3vl_train.dist.ranks import Ranks

_SHOWN = 3
Held = list[tuple[str, dict[str, Any]]]
"""Names, and what is looked at of each, as JSON."""


def plan_fault(step: int, marks: list[list[int]]) -> str:
    """Say which ranks have planned a step otherwise. marks: the `PlanMark` of every rank."""
    apart = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    what = "stand elsewhere in the data" if marks[apart[0]][0] != marks[0][0] else "have planned other samples"
    named = ", ".join(map(str, apart[:20])) + (f" and {len(apart) - 20} more" if len(apart) > 20 else "")
    return (
        f"step {step}: ranks {named} {what} than rank 0, so samples would be left out or trained twice; no weight was "
        "changed. Give all machines the same files and the same versions, and start again from the last checkpoint"
    )


def check_same_data(held: Held, ranks: Ranks) -> None:
    """Raise ValueError on every rank where they do not hold the same, naming the first difference of each rank.

    Every rank must call it.
    """
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    of_main = ranks.on_main(lambda: held)
    told = ranks.gather(None if held == of_main else _difference(held, of_main))
    lines = [f"\n  - rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
    raise ValueError(
        f"data: {len(lines)} of {len(told)} ranks do not have what rank 0 has; give all machines the same files"
        + "".join(lines[:_SHOWN])
    )


def _difference(held: Held, of_main: Held) -> str:
    for (name, content), (name_of_main, of_rank_0) in zip(held, of_main, strict=False):
        if name != name_of_main:
            return f"{name} where rank 0 has {name_of_main}"
        for key in of_rank_0:
            if content.get(key) != of_rank_0[key]:
                return f"{name}: {key} {str(content.get(key))[:80]}, on rank 0 {str(of_rank_0[key])[:80]}"
    return f"{len(held) - 1} files, on rank 0 {len(of_main) - 1}"


LOOK_SECONDS = 30.0  # NFS may show a folder as it was up to 30 s ago (its acdirmin)


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """See that what rank 0 writes beside the run folder is there for every rank. Every rank must call it.

    Raises ValueError on all ranks, naming those that look at another disk: each would save its own pieces there. Leaves
    nothing behind.
    """
    if ranks.world_size == 1:
        return
    token = ranks.on_main(lambda: _write_token(folder))
    deadline = time.monotonic() + LOOK_SECONDS
    # Listing, not asking for the name: that it is not there would be kept in mind by a network file system.
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


def check_same_weights(model_path: str, ranks: Ranks) -> None:
    """Compare the base weights of all ranks by `WeightFiles.fingerprint`. Every rank must call it.

    Raises ValueError on all ranks, naming those whose model folder is unreadable, or other than rank 0's.
    """
    if ranks.world_size == 1:
        return
    fault, fingerprint = None, 0
    try:
        fingerprint = WeightFiles(model_path).fingerprint()
    except (ValueError, OSError) as error:
        fault = str(error)
    found = ranks.gather((fault, fingerprint, socket.gethostname()))
    for rank, (told, _, host) in enumerate(found):
        if told:
            raise ValueError(f"rank {rank} on {host}: {told}")
    if others := [f"rank {rank} on {host}" for rank, (_, print_, host) in enumerate(found) if print_ != found[0][1]]:
        raise ValueError(
            f"{model_path}: {', '.join(others)} {'has' if len(others) == 1 else 'have'} other weights there than rank "
            f"0 on {found[0][2]}; copy one model folder to all machines, or share it"
        )
