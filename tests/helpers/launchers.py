"""Starting `launch/sft.py` as a user would: in processes of their own, by torchrun and by others."""

import os
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from qwen3vl_train.config import Recipe, save_recipe
from tests.helpers import small_runs

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SFT = ROOT / "launch" / "sft.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]


def environment(**more: str) -> dict[str, str]:
    """What the processes get: this checkout first on the path, one thread each, no variable of another launcher."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{BIN}{os.pathsep}{kept['PATH']}"
    network = {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}
    return {**kept, **network, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(*arguments: str) -> list[str]:
    """The command that starts two ranks of this host at a free port."""
    return [*TORCHRUN, "--master-port", free_port(), *arguments]


def write_recipe(file: Path, recipe: Recipe) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, file)
    return file


def short_recipe(model: Path, task: Path, out: Path, **overrides) -> Path:
    """A recipe file of three steps on two ranks."""
    values = {"train__num_steps": 3, "checkpoint__every_steps": None, **overrides}
    return write_recipe(out / "recipe.yaml", small_runs.make_recipe(model, task, out, **values))


def start(command: list[str], *, output: int = subprocess.PIPE, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
    """Start in a session of its own. `end` must be called on it. output: where what it prints goes."""
    process = subprocess.Popen(
        command, env=environment(**{_MARK: (mark := uuid.uuid4().hex)}, **more), cwd=cwd, text=True,
        start_new_session=True, stdout=output, stderr=output,
    )  # fmt: skip
    _marks[process.pid] = mark
    return process


def run(
    command: list[str], *, timeout: float = 1800, cwd: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run in a session of its own and wait; none of its processes remain, whatever happens."""
    process = start(command, cwd=cwd, **more)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


# Ranks have sessions of their own, and outlive a torchrun that was killed: an inherited variable identifies them.
_MARK = "QWEN3VL_TRAIN_TEST_START"
_marks: dict[int, str] = {}


def end(process: subprocess.Popen) -> None:
    """Kill a process that `start` has started, and everything that came of it, in whatever session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    mark = f"{_MARK}={_marks.pop(process.pid)}".encode()
    while left := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has(pid, mark)]:
        for pid in left:  # again until there are none: one may have started another meanwhile
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()


def _has(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # of another user, or gone meanwhile; a zombie's is empty
        return False
