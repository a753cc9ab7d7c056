"""One job at a time writes to a folder, and a dead one keeps nobody out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3vl_train.checkpoint.folder_lock import LOCK_FILE, FolderLock
from tests.helpers import faults
from tests.helpers.launchers import environment
from tests.helpers.messages import message_of

HOLD = """
import os, sys
from pathlib import Path
from qwen3vl_train.checkpoint.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:  # a child process, as a worker of the loader is, that lives on
    os.close(1)
    sys.stdin.read()
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `tmp_path / "run"`, and its number."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())


def elsewhere(folder: Path, **more: str) -> Path:
    """Write the lock file of a process on another machine, as this one sees it."""
    folder.mkdir(exist_ok=True)
    holder = {"host": "node-7", "process": 12, "token": "t", "system": "other", "started": "2026-01-01 08:00:00 +0000"}
    (folder / LOCK_FILE).write_text(json.dumps({**holder, **more}))
    return folder / LOCK_FILE


def test_a_second_job_is_refused_and_touches_nothing(tmp_path: Path, holder):
    process, number = holder
    lock_file = tmp_path / "run" / LOCK_FILE
    before = lock_file.read_text()
    message = message_of(ValueError, FolderLock, tmp_path / "run")
    started = json.loads(before)["started"]
    assert message == (
        f"{tmp_path}/run: in use by process {number} on {socket.gethostname()}, started {started}; wait until it ends, "
        "or choose another name"
    )
    assert lock_file.read_text() == before
    process.stdin.close()
    assert process.wait() == 0
    assert not (tmp_path / "run").exists(), "it made the folder, wrote nothing there, and took it away"
    FolderLock(tmp_path / "run").release()


def test_a_killed_job_keeps_nobody_out_nor_do_its_children(tmp_path: Path, holder):
    process, number = holder
    os.kill(number, signal.SIGKILL)
    process.wait()
    lock = FolderLock(tmp_path / "run")
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == os.getpid()
    lock.check()
    lock.release()


def test_a_job_elsewhere_that_sends_heartbeats_is_alive(tmp_path: Path):
    """A file system that does not share its locks grants one here too."""
    file = elsewhere(tmp_path)
    faults.set_lock_times(poll=0.01)
    before = file.read_text()
    message = message_of(
        ValueError, lambda: FolderLock(tmp_path, waiting=lambda: os.utime(file, ns=(0, time.time_ns())))
    )
    assert message.startswith(f"{tmp_path}: in use by process 12 on node-7, started 2026-01-01 08:00:00 +0000; wait")
    assert file.read_text() == before


def test_a_job_elsewhere_without_heartbeats_is_dead(tmp_path: Path, capsys):
    elsewhere(tmp_path)
    faults.set_lock_times(poll=0.01, stale=0.1)
    looks: list[None] = []
    lock = FolderLock(tmp_path, waiting=lambda: looks.append(None))
    assert looks, "the other ranks are shown that rank 0 is alive"
    assert "node-7" in (shown := capsys.readouterr().err)
    assert "waiting up to" in shown
    lock.check()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_job_elsewhere_of_long_ago_is_not_waited_for(tmp_path: Path):
    os.utime(elsewhere(tmp_path), (1, 1))
    FolderLock(tmp_path, waiting=lambda: pytest.fail("waited")).release()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_file_without_a_name_is_nobodys(tmp_path: Path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    FolderLock(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_without_locks_of_the_file_system_heartbeats_decide(tmp_path: Path):
    faults.refuse_file_locks()
    faults.set_lock_times(poll=0.01, stale=0.1, heartbeat=0.02)
    lock = FolderLock(tmp_path)
    assert "in use by process" in message_of(ValueError, FolderLock, tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_a_job_that_lost_its_lock_says_so(tmp_path: Path):
    lock = FolderLock(tmp_path)
    lock.check()
    file = elsewhere(tmp_path)
    message = message_of(RuntimeError, lock.check)
    assert message.startswith(f"{tmp_path}: taken over by process 12 on node-7, started 2026")
    lock.release()
    assert "node-7" in file.read_text(), "the lock of the other one stays"


def test_a_removed_and_new_folder_is_another_ones(tmp_path: Path):
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / LOCK_FILE).unlink()
    lock.check()
    other = elsewhere(tmp_path / "run")
    assert "taken over by another job" in message_of(RuntimeError, lock.check)
    lock.release()
    assert other.exists()


def test_the_lock_is_renewed(tmp_path: Path):
    faults.set_lock_times(heartbeat=0.01)
    lock = FolderLock(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    while (tmp_path / LOCK_FILE).stat().st_mtime == 1:
        time.sleep(0.01)
    lock.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "a").write_text("a file")
    message = message_of(ValueError, FolderLock, tmp_path / "a" / "run")
    assert message == f"{tmp_path}/a/run: cannot be written (Not a directory); choose another output_dir"
