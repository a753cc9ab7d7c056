"""The marks `ranks` (starts ranks) and `process` (starts other child processes), which `make test-fast` deselects.

A test gets them by itself where its code, or that of a fixture, names what starts processes. Where the code does not
show it (`num_workers=2`, say), the mark is written at the test; a test without either mark that starts
a process fails.
"""

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

_STARTERS = {"run_ranks": "ranks", "in_child": "process", "launchers": "process", "subprocess": "process",
             "multiprocessing": "process", "in_workers": "process", "from_worker": "process"}  # fmt: skip
_STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen"}
_forbidden_for: str | None = None
_started: list[str] = []


def add_marks(item: pytest.Item) -> None:
    """Mark a collected test whose code names what starts processes, or whose parameter `workers` is more than zero."""
    if hasattr(item, "callspec") and item.callspec.params.get("workers"):
        item.add_marker("process")
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]  # type: ignore
    for function in (item.function, *fixtures):  # type: ignore[attr-defined]
        for mark in marks_of(inspect.unwrap(function)):
            item.add_marker(mark)


def marks_of(function: Any) -> set[str]:
    """Return the marks of what a test or fixture, or a function of the tests that it calls, names."""
    return {_STARTERS[name] for name in _names(function, set()) if name in _STARTERS}


def _names(value: Any, seen: set[Any]) -> Iterator[str]:
    """Yield every name that a function or class of the tests uses, and those of what it calls in its own module."""
    if not isinstance(value, FunctionType | type) or value in seen or not value.__module__.startswith("tests"):
        return
    seen.add(value)
    if isinstance(value, type):
        for method in vars(value).values():
            yield from _names(method, seen)
        return
    for name in set(_names_in(value.__code__)):
        yield name
        if name not in _STARTERS:
            yield from _names(value.__globals__.get(name), seen)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def watch(item: pytest.Item) -> None:
    """Note from now on whether this test, its fixtures included, starts a process without one of the marks."""
    global _forbidden_for
    marked = any(item.get_closest_marker(name) for name in ("ranks", "process", "measures", "slow", "browser"))
    _forbidden_for = None if marked else item.nodeid
    _started.clear()


def check() -> None:
    """Fail where the test that `watch` was called for started a process."""
    started = _started.copy()
    _started.clear()
    assert not started, started[0]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    # Nothing is raised here: a library that meets an error while it starts its service may never return (wandb 0.31).
    if _forbidden_for is not None and event in _STARTS:
        _started.append(f"{_forbidden_for} starts a process ({event} {arguments[:1]}); mark it `process` or `ranks`")


sys.addaudithook(_note)
