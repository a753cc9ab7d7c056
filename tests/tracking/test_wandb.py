import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_train.config import recipe_from_dict, save_recipe
from qwen3vl_train.config.yaml12 import write_yaml
from qwen3vl_train.tracking.console import Console
from qwen3vl_train.tracking.wandb import SilentTracker, git_state, open_tracker

ROW = {"step": 12, "loss": 1.23456, "lr": 2e-5, "tokens_per_second": 5120.4, "seconds": 0.5}

SESSION = """
import sys
from pathlib import Path
from qwen3vl_train.config import load_recipe
from qwen3vl_train.tracking.wandb import open_tracker
first = int(sys.argv[3])
tracker = open_tracker(load_recipe(sys.argv[1]), Path(sys.argv[2]), rank=0)
for step in (first, first + 1):
    tracker.log({"step": step, "loss": 1 / step, "mfu": None}, step)
tracker.log({"eval/loss": 9.0}, first + 1)
tracker.finish()
"""


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    """An empty home and no W&B settings, whatever the machine has."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def recipe(wandb: str):
    return recipe_from_dict(
        {
            "name": "tiny",
            "model": {"path": "https://user:secret@host/model"},
            "tune": {"method": "lora"},
            "data": {"train": [{"path": "a.jsonl"}]},
            "track": {"wandb": wandb, "project": "trial", "group": "pair", "tags": ["a", "b"], "notes": "why"},
        }
    )


def records(path: Path):
    """Records of a .wandb file: a leveldb log (blocks of 32 KiB, 7-byte chunk headers) after a 7-byte file header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last chunk of one
            yield Record.FromString(record)
            record = b""


def history_and_config(path: Path) -> tuple[list[dict], dict]:
    history, config = [], {}
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    return history, config


def test_an_offline_run_resumes_under_its_id(tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    # Not save_recipe, which would take the password out before the tracker sees it.
    (tmp_path / "recipe.yaml").write_text(write_yaml(recipe("offline").to_dict()))
    for first in (1, 3):  # a process each, as a resume is; W&B completes its file when the process ends
        command = [sys.executable, "-c", SESSION, str(tmp_path / "recipe.yaml"), str(run_dir), str(first)]
        subprocess.run(command, check=True)
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    files = sorted(run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files
    rows = [row for file in files for row in history_and_config(file)[0]]
    assert [(row["_step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [row.get("eval/loss") for row in rows] == [None, 9.0, None, 9.0]
    assert all("mfu" not in row and "step" not in row for row in rows)
    _, config = history_and_config(files[0])
    assert config["model"]["path"] == "https://***@host/model"
    run = next(record.run for record in records(files[0]) if record.HasField("run"))
    shown = run.display_name, run.project, run.run_group, list(run.tags), run.notes
    assert shown == ("tiny", "trial", "pair", ["a", "b"], "why")
    assert config["optim"]["lr"] == 1e-4
    assert set(config["git"] or {}) <= {"commit", "dirty"}
    assert b"secret" not in b"".join(file.read_bytes() for file in run_dir.rglob("*") if file.is_file())


STOPPED_SESSION = """
import sys
from pathlib import Path
from qwen3vl_train.config import load_recipe
from qwen3vl_train.dist.stop import STOPPED
from qwen3vl_train.tracking.wandb import open_tracker
open_tracker(load_recipe(sys.argv[1]), Path(sys.argv[2]), rank=0, run_id="abc123").finish(STOPPED)
"""


def test_a_lost_run_id_comes_from_the_checkpoint(tmp_path):
    save_recipe(recipe("offline"), tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", STOPPED_SESSION, str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    subprocess.run(command, check=True)
    assert (tmp_path / "run" / "wandb_run_id").read_text() == "abc123\n"
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*-abc123/run-abc123.wandb")
    kept = list(records(file))
    assert any(record.HasField("preempting") for record in kept)
    assert [record.exit.exit_code for record in kept if record.HasField("exit")] == [75]


@pytest.mark.process  # wandb's own service
def test_online_without_a_login_is_an_error_before_any_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"track.wandb: online, but no W&B login found; run `wandb login`"):
        open_tracker(recipe("online"), tmp_path / "run", rank=0)


def test_other_ranks_and_off_are_silent(tmp_path):
    for tracker in (open_tracker(recipe("online"), tmp_path / "a", 1), open_tracker(recipe("off"), tmp_path / "b", 0)):
        tracker.log({"loss": 1.0}, 1)
        tracker.finish()
        assert isinstance(tracker, SilentTracker)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_damaged_run_id_is_named(tmp_path):
    (tmp_path / "wandb_run_id").write_text("../x\n")
    with pytest.raises(ValueError, match=r"wandb_run_id: '../x' is not a W&B run id; delete the file"):
        open_tracker(recipe("offline"), tmp_path, rank=0)


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("one")
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*user, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = git_state(tmp_path)
    (tmp_path / "new").write_text("not tracked")
    assert git_state(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    changed = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], changed) == (False, {"commit": clean["commit"], "dirty": True})
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_a_log_skips_lines_of_quick_steps(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    console = Console(300, file=out)
    for step, loss, seconds in ((12, 1.23456, 0.0), (13, 1.0, 1.0), (14, 1.0, 3.9), (15, None, 0.2), (300, 1.0, 0.1)):
        now += seconds
        console.step({**ROW, "step": step, "loss": loss})
    console.line("[saved] step 13")
    console.close()
    assert out.getvalue() == (
        "step 12/300 loss 1.2346 lr 2.00e-05 tokens/s 5,120 eta 0:02:24\n"
        "step 15/300 loss nan lr 2.00e-05 tokens/s 5,120 eta 0:02:22\n"
        "step 300/300 loss 1.0000 lr 2.00e-05 tokens/s 5,120 eta 0:00:00\n"
        "[saved] step 13\n"
    )


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    near, far = os.openpty()
    with os.fdopen(far, "w") as terminal:
        console = Console(300, file=terminal, start_step=10)
        console.step(ROW)
        console.line("[saved] step 12")
        console.close()
        console.close()
        terminal.write("end of output")
        terminal.flush()
        shown = ""
        while not shown.endswith("end of output"):
            shown += os.read(near, 65536).decode()
    os.close(near)
    assert "\x1b[" in shown
    for part in ("[saved] step 12", "12/300", "loss 1.2346", "lr 2.00e-05", "tokens/s 5,120", "eta 0:02:24"):
        assert part in shown
