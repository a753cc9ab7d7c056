"""The lock on a folder, so that one job at a time writes there, also where jobs of several machines share the disk."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""Without a heartbeat, after which a holder on another machine counts as dead."""
POLL_SECONDS = 0.5
_OLD_SECONDS = 3600.0
"""Since the last heartbeat, by the clock of this machine: more than the clocks of two machines differ."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """The lock of this process on a folder, from the moment the object is made until `release`.

    The system drops a lock with its process, and child processes do not inherit it (fcntl). What it cannot see, a
    holder on another machine whose file system does not share locks, is recognised by the time of the lock file, which
    the holder renews; no two clocks are compared within an hour. Two threads of one process do not exclude each other.
    """

    def __init__(self, folder: Path, *, waiting: Callable[[], None] = lambda: None) -> None:
        """Make the folder where there is none, and lock it.

        Raises ValueError where another job holds the lock, and where the folder cannot be written.

        waiting: called now and then while it is not clear whether the last holder is dead.
        """
        self.folder, self._file = folder, folder / LOCK_FILE
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
        self._token = uuid.uuid4().hex
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire(waiting)
        except OSError as error:
            self._remove_folder()
            raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from error
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RuntimeError where another job has taken the lock, which it may after STALE_SECONDS of silence."""
        holder = _read_holder(self._descriptor)
        if not self._is_replaced() and (holder is None or holder.get("token") == self._token):
            return
        who = _describe(holder) if holder and holder.get("token") != self._token else "another job"
        raise RuntimeError(
            f"{self.folder}: taken over by {who} because this process had not responded; it trains no further, let the "
            "other one continue"
        )

    def release(self) -> None:
        """Give the lock back, and remove the folders that this object made and that are empty."""
        self._done.set()
        self._thread.join()
        holder = _read_holder(self._descriptor)
        if holder is not None and holder.get("token") == self._token and not self._is_replaced():
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._remove_folder()

    def _acquire(self, waiting: Callable[[], None]) -> int:
        """Return the descriptor of the lock file, which holds the name of this process."""
        dead: str | None = None  # the token of a holder that has sent no heartbeat
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locked = _try_lock(descriptor)
                if locked is False:
                    raise self._in_use(_read_patiently(descriptor))
                holder = _read_holder(descriptor)
                # Where this system grants a lock, a holder of the same system is gone.
                is_gone = holder is None or holder.get("token") == dead or (locked and _is_of_this_system(holder))
                if is_gone and not _is_another_file(descriptor, self._file):
                    self._write_holder(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            # Closed, because every look at the file opens it anew and closing any descriptor of it drops the lock.
            os.close(descriptor)
            if holder is not None and not is_gone:
                self._wait_for_heartbeat(holder, waiting)
                dead = holder.get("token")

    def _wait_for_heartbeat(self, holder: dict[str, Any], waiting: Callable[[], None]) -> None:
        """Return once the holder is dead. Raise ValueError once it is seen to be alive."""
        first = self._look()
        if first is None or time.time() - first[1] / 1e9 > _OLD_SECONDS:
            return
        print(
            f"{self.folder}: last used by {_describe(holder)}; waiting up to {STALE_SECONDS:.0f} s to see whether it "
            "still runs",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        started = time.monotonic()
        while time.monotonic() - started < STALE_SECONDS:
            time.sleep(POLL_SECONDS)
            waiting()
            now = self._look()
            if now is None:
                return
            if now != first:
                raise self._in_use(now[0] or holder)

    def _look(self) -> tuple[dict[str, Any] | None, int] | None:
        """Return the holder and the time of the lock file, None where there is no file.

        It is opened each time: a network file system answers from its memory for a file that it only asks about.
        """
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return _read_holder(descriptor), os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _write_holder(self, descriptor: int) -> None:
        holder = {
            "host": socket.gethostname(), "process": os.getpid(), "token": self._token, "system": _system_id(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }  # fmt: skip
        content = json.dumps(holder).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)

    def _renew(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that does not answer now may do so the next time
                os.utime(self._descriptor)

    def _is_replaced(self) -> bool:
        return self._file.exists() and _is_another_file(self._descriptor, self._file)

    def _remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # it is in use, and is meant to stay
            for path in self._made:
                path.rmdir()

    def _in_use(self, holder: dict[str, Any] | None) -> ValueError:
        who = _describe(holder) if holder else "another job"
        return ValueError(f"{self.folder}: in use by {who}; wait until it ends, or choose another name")


def _try_lock(descriptor: int) -> bool | None:
    """Return whether the lock was free; None where the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX allows both
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read_holder(descriptor: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _read_patiently(descriptor: int) -> dict[str, Any] | None:
    """Return the holder, which may have locked the file just now and be about to write its name."""
    for _ in range(20):
        if holder := _read_holder(descriptor):
            return holder
        time.sleep(0.1)
    return None


def _is_another_file(descriptor: int, file: Path) -> bool:
    """Return whether the name of an open file is meanwhile that of another file, or of none."""
    try:
        return not os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return True


def _is_of_this_system(holder: dict[str, Any]) -> bool:
    return bool(_system_id()) and holder.get("system") == _system_id()


def _system_id() -> str:
    """Return the id of the running kernel, which all containers on it share; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}, started {holder.get('started')}"
