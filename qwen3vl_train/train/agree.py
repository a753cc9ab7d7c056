"""What all ranks must find alike before they begin: the run folder, and the weights to start from."""

import os
import socket
import time
import uuid
from pathlib import Path

from qwen3vl_train.checkpoint.hf import WeightFiles
from qwen3vl_train.dist import Ranks

LOOK_SECONDS = 30.0  # NFS may show a folder as it was up to 30 s ago (its acdirmin)


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """See that what rank 0 writes beside the run folder is there for every rank. Every rank must call it.

    Raises ValueError on all ranks, naming those that look at another disk: each would save its own pieces there. Leaves
    nothing behind.
    """
    if ranks.world_size == 1:
        return
    token = ranks.from_main(lambda: _write_token(folder))
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
