"""Errors to exit codes, for every script."""

import os
import sys
from collections.abc import Callable

from qwen3vl_train.public_names import public_text


def run_or_explain(work: Callable[[], object]) -> int:
    """Run some work and return the exit code; known errors are printed as a message without a traceback.

    0: done.
    1: RuntimeError or OSError, it failed while running.
    2: ValueError, the input must be fixed.
    75: a signal asked it to stop; it has saved and can be started again.
    """
    from qwen3vl_train.dist.rendezvous import stop_ranks
    from qwen3vl_train.dist.stop import STOPPED, StopRequest

    try:
        work()
        return 0
    except StopRequest as stop:
        if os.environ.get("RANK", "0") == "0":
            print(public_text(str(stop)), flush=True)
        return STOPPED
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("QWEN3VL_TRACEBACK"):
            raise
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        # Notes: what else went wrong, such as a checkpoint that could not be written.
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        print(f"{rank}error: {public_text(message)}\n(QWEN3VL_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        stop_ranks()
