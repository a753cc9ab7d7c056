"""Where ranks other than 0 print to: a file of their own, so that the terminal shows one run and not a thousand."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from qwen3vl_train.dist.ranks import Ranks


def rank_log_path(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank}.log"


@contextmanager
def rank_log(folder: Path, ranks: Ranks) -> Iterator[TextIO]:
    """Send what this process and its libraries print to `folder/logs/rank-<n>.log`, and give the file to print to.

    Rank 0 keeps its terminal: it gets sys.stdout and nothing is moved. The file descriptors themselves are moved, so
    that NCCL's and gloo's own messages go there too; both come back at the end, so an error that ends the run is
    printed by every rank where it can be seen. A resumed run appends.
    """
    if ranks.is_main:
        yield sys.stdout
        return
    path = rank_log_path(folder, ranks.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{started} rank {ranks.rank} of {ranks.world_size} on {os.uname().nodename}, {ranks.device}", file=file)
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            with redirect_stdout(file), redirect_stderr(file):
                yield file
        finally:
            for number, before in kept.items():
                os.dup2(before, number)
                os.close(before)
