"""Stop requests: the signals that schedulers send before they take a machine away."""

import os
import signal
import socket
import threading
from types import FrameType

STOPPED = 75  # exit code of a run that was asked to stop, saved, and can be started again (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest(RuntimeError):
    """The run was asked to stop, has saved, and ends early."""


class StopSignals:
    """A context manager that turns the first SIGTERM or SIGUSR1 into a request, which the loop sees after its step.

    A second signal ends the process at once with exit code 128 + its number, also while the main thread is inside a
    collective. The previous handlers are restored at the end of the block. Python handles signals in the main thread
    only; where training runs in another thread (Ray), nothing is installed and the parent decides.
    """

    def __init__(self) -> None:
        self._handled = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self._handled > 0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        # A main thread that waits in C++ for a rank that never comes runs no Python handler. But the number of the
        # signal is written to this socket at once, and a thread counts the numbers.
        self._numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._counter = threading.Thread(target=self._count, name="signals", daemon=True)
        self._counter.start()
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._fd_before)
        # This ends the thread. `close` would not: the loader's workers hold the socket open too.
        self._written.shutdown(socket.SHUT_WR)
        self._counter.join()
        self._written.close()
        self._numbers.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        if self._handled > 1:
            os._exit(128 + number)

    def _count(self) -> None:
        received = 0
        while numbers := self._numbers.recv(1):
            received += numbers[0] in _SIGNALS
            if received > 1:
                os._exit(128 + numbers[0])
