"""torchrun, accelerate and deepspeed start the same run, which reads only the environment that they set."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3vl_train.checkpoint.manifest import checkpoint_folder, latest_checkpoint
from qwen3vl_train.config import load_recipe
from tests.helpers import launchers, small_runs
from tests.helpers.ranks import run_ranks

SLOW_STEPS = """
import os, sys, time
from qwen3vl_train.train.cli import sft
from tests.helpers import faults

def late(step):
    time.sleep({seconds} if os.environ["RANK"] in {ranks} and step in {steps} else 0)

faults.around_steps(before=late)
if __name__ == "__main__":
    sys.exit(sft())
"""


@pytest.fixture(scope="module")
def on_two_ranks(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run by two forked ranks, as they are by torchrun (tests/train/test_killed.py)."""
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(small_runs.train_on_rank, 2, load_recipe(launchers.short_recipe(tiny_folder, task, out)))
    return small_runs.losses(out / "run")


# Without a GPU `accelerate launch --num_processes 2` starts one process and says nothing; --multi_gpu makes two.
OTHERS = {
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
}


@pytest.mark.parametrize("launcher", OTHERS)
def test_other_launchers_start_the_same_run(
    tiny_folder: Path, task: Path, tmp_path: Path, on_two_ranks: list[float], launcher: str
):
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path)
    program, *options = OTHERS[launcher]
    command = [str(launchers.BIN / program), *options, launchers.free_port(), str(launchers.SFT), str(recipe)]
    done = launchers.run(command, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    assert "full, 2 ranks on cpu" in done.stdout
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()
    assert small_runs.losses(tmp_path / "run") == on_two_ranks


LATE_RANK = """
import os, sys, time
from pathlib import Path
from qwen3vl_train.train.cli import sft
from tests.helpers import faults

ended = Path(sys.argv[2])

def wait_for_the_end_of_rank_0(step):
    while os.environ["RANK"] == "1" and step == 3 and not ended.exists():
        time.sleep(0.05)

faults.around_steps(before=wait_for_the_end_of_rank_0)
if __name__ == "__main__":
    code = sft([sys.argv[1]])
    ended.touch()
    sys.exit(code)
"""


def test_a_late_rank_ends_the_run_with_its_name(tiny_folder: Path, task: Path, tmp_path: Path):
    (script := tmp_path / "late.py").write_text(LATE_RANK)
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path, parallel={"timeout_seconds": 20})
    done = launchers.run(launchers.torchrun(str(script), str(recipe), str(tmp_path / "ended")))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    place = lines.index("[rank 0] error: step 3: rank 1 is late")
    assert "  rank 0: last step 2, waiting for the others" in lines[place + 1 : place + 3]
    assert any(line.startswith("  rank 1: last step 2, at ") for line in lines[place + 1 : place + 3])
    assert small_runs.losses(tmp_path / "run")[1:], "the steps before are on disk"


STOPPABLE = """
import os, signal, sys, time
from pathlib import Path
from qwen3vl_train.train.cli import sft
from tests.helpers import faults

folder = Path(sys.argv[2])

def wait_for_signal(step):
    if step == 3:
        (folder / f"within-{os.environ['RANK']}").touch()
        while not signal.getsignal(signal.SIGTERM).__self__.received:  # a method of StopSignals
            time.sleep(0.02)

faults.around_steps(before=wait_for_signal)
if __name__ == "__main__":
    code = sft([sys.argv[1]])
    (folder / f"code-{os.environ['RANK']}").write_text(str(code))
    sys.exit(code)
"""


def test_a_stop_under_torchrun_saves_and_resumes(tiny_folder: Path, task: Path, tmp_path: Path):
    """torchrun hands SIGTERM on to the process groups of its ranks, in which the loader's workers are too."""
    case = {"train__num_steps": 5, "data__num_workers": 2, "tune": small_runs.LORA}
    (script := tmp_path / "stoppable.py").write_text(STOPPABLE)
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path, **case)
    agent = launchers.start(launchers.torchrun("--monitor-interval", "0.1", str(script), str(recipe), str(tmp_path)))
    try:
        deadline = time.monotonic() + 900
        while not all((tmp_path / f"within-{rank}").exists() for rank in (0, 1)):
            assert agent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        out, errors = agent.communicate(timeout=900)
    finally:
        launchers.end(agent)
    codes = [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)]
    assert codes == ["75", "75"], errors
    assert agent.returncode == 1, "torchrun keeps the ranks' code to itself"
    run = tmp_path / "run"
    assert f"{run}: asked to stop, saved after step 3; start it again to continue" in out
    assert latest_checkpoint(run) == checkpoint_folder(run, 3)
    for file in (recipe, launchers.short_recipe(tiny_folder, task, tmp_path / "straight", **case)):
        run_ranks(small_runs.train_on_rank, 2, load_recipe(file))
    assert _rows(run) == [1, 2, 3, 4, 5]
    assert small_runs.losses(run) == small_runs.losses(tmp_path / "straight" / "run")
    expected = small_runs.final_tensors(tmp_path / "straight" / "run")
    small_runs.assert_same_tensors(small_runs.final_tensors(run), expected)


def _agent(port: str, recipe: Path, script: Path) -> subprocess.Popen:
    """One machine of two: torchrun with one rank, with the rendezvous at a port of this host."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test",
        "--monitor-interval", "0.5", "--rdzv-conf",
        "join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2",
        str(script), str(recipe),
    ]  # fmt: skip
    # As docs/scaling.md says: without this variable, torch 2.13 never lets a new agent take the place of a lost one.
    return launchers.start(command, output=subprocess.DEVNULL, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def _two_agents(slow_run: tuple[Path, Path]) -> tuple[str, list[subprocess.Popen]]:
    port = launchers.free_port()
    first = _agent(port, *slow_run)
    time.sleep(3)  # the first agent hosts the rendezvous
    return port, [first, _agent(port, *slow_run)]


def _rows(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def _wait_for_rows(run: Path, count: int, agents: list[subprocess.Popen], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while len(_rows(run)) < count:
        assert time.monotonic() < deadline, f"{_rows(run)} after {seconds} s"
        assert all(agent.poll() is None for agent in agents), [agent.poll() for agent in agents]
        time.sleep(0.2)


def _kill_machine(agent: subprocess.Popen) -> None:
    """Kill an agent and its rank, which has a session of its own, as a power cut would."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in [*children, agent.pid]:
        os.kill(int(pid), signal.SIGKILL)
    agent.wait()


@pytest.fixture
def slow_run(tiny_folder: Path, task: Path, tmp_path: Path) -> tuple[Path, Path]:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_STEPS.format(seconds=0.3, ranks=("0", "1"), steps=range(99)))
    recipe = launchers.short_recipe(tiny_folder, task, tmp_path, train__num_steps=14, checkpoint__every_steps=2)
    return recipe, script


@pytest.mark.slow
def test_a_new_machine_replaces_a_lost_one(tiny_folder: Path, task: Path, tmp_path: Path, slow_run: tuple[Path, Path]):
    straight = launchers.short_recipe(tiny_folder, task, tmp_path / "straight", train__num_steps=14)
    assert launchers.run(launchers.torchrun(str(launchers.SFT), str(straight))).returncode == 0
    port, agents = _two_agents(slow_run)
    try:
        _wait_for_rows(tmp_path / "run", 5, agents)
        _kill_machine(agents.pop())
        time.sleep(5)  # until the loss is noticed; a machine that comes sooner takes the dead one for alive
        agents.append(_agent(port, *slow_run))
        assert [agent.wait(900) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            launchers.end(agent)
    starts = (tmp_path / "run" / "logs" / "rank-1.log").read_text().count(" rank 1 of 2 on ")
    assert starts == 2
    assert small_runs.losses(tmp_path / "run") == small_runs.losses(tmp_path / "straight" / "run")


@pytest.mark.slow
def test_the_loss_of_the_rendezvous_machine_ends_the_run(tmp_path: Path, slow_run: tuple[Path, Path]):
    _, agents = _two_agents(slow_run)
    try:
        _wait_for_rows(tmp_path / "run", 5, agents)
        _kill_machine(agents.pop(0))
        assert agents[0].wait(900) == 1
    finally:
        for agent in agents:
            launchers.end(agent)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir(), "the next start resumes from here"
