"""Starting `launch/sft.py` as a user would: in processes of their own, by torchrun and by others."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import tiny_runs

from qwen3vl_train.config import Recipe, save_recipe

ROOT = Path(__file__).resolve().parents[1]
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


def write_recipe(file: Path, recipe: Recipe) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, file)
    return file


def short_recipe(model: Path, task: Path, out: Path, **overrides) -> Path:
    """A recipe file of three steps on two ranks."""
    values = {"train__num_steps": 3, "checkpoint__every_steps": None, **overrides}
    return write_recipe(out / "recipe.yaml", tiny_runs.make_recipe(model, task, out, **values))


def run(command: list[str], *, timeout: float = 400, **more: str) -> subprocess.CompletedProcess[str]:
    """Run in a session of its own and wait; nothing of it is left behind, whatever happens."""
    process = subprocess.Popen(
        command, env=environment(**more), cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def end(process: subprocess.Popen) -> None:
    """Kill a process and what it has started in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
