"""What the terminal shows while the data is indexed."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class IndexProgress:
    """A bar on a terminal, elsewhere a line now and then; nothing before it is called. Use it in a with-block."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("data: looking at rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(file=sys.stderr), transient=True,
        )  # fmt: skip
        self._task = None
        self._said = time.monotonic()

    def __enter__(self) -> "IndexProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that so many rows of so many have been looked at."""
        if self._bar.console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._bar.console.print(f"data: looked at {done:,} of {total:,} rows", highlight=False)
