"""Being asked to stop: what schedulers send before they take a machine away."""

import os
import signal
import threading
from types import FrameType

from qwen3vl_train.dist import Ranks

STOPPED = 75
"""Exit code of a run that was asked to stop, saved, and can be started again (EX_TEMPFAIL)."""


class StopRequest(RuntimeError):
    """The run has saved and ends early because it was asked to."""


class StopSignals:
    """Turns the first SIGTERM or SIGUSR1 into a request that the loop sees after its step; a second one ends the
    process at once.

    A with-block: the handlers that were there before come back at its end. Python handles signals in the main thread
    alone; where the training runs in another one (Ray), nothing is installed and what started it decides.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os._exit(128 + number)
        self._received = signal.Signals(number)

    def requested(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Every rank must call it, after every step."""
        return ranks.max(float(self._received is not None)) > 0
