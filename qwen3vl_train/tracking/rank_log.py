"""A log file for each rank other than 0, so that the terminal shows the run once."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.outputs import writing


@contextmanager
def rank_log(folder: Path, ranks: Ranks) -> Iterator[TextIO]:
    """Redirect what this process and its libraries print to `folder/logs/rank-<n>.log`, and yield the file to print to.

    Rank 0 keeps the terminal: it gets sys.stdout. The file descriptors themselves are redirected, so that messages of
    NCCL and gloo go to the file too. They are restored at the end, so every rank prints the error that ends a run to
    the terminal. A resumed run appends.
    """
    if ranks.is_main:
        yield sys.stdout
        return
    path = folder / "logs" / f"rank-{ranks.rank}.log"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{started} rank {ranks.rank} of {ranks.world_size} on {os.uname().nodename}, {ranks.device}", file=file)
    try:
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
    finally:
        with contextlib.suppress(OSError):  # a full disk: what could not be written before is tried again here
            file.close()
