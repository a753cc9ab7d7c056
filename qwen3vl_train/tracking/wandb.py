"""The experiment tracker: Weights & Biases, offline unless asked."""

import netrc
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwen3vl_train.config import Recipe, public_dict
from qwen3vl_train.dist.stop import STOPPED
from qwen3vl_train.outputs import writing
from qwen3vl_train.public_names import public_text
from qwen3vl_train.tracking.wandb_settings import WandbSettings, wandb_settings


class SilentTracker:
    """A WandbTracker that records nothing, but keeps the run_id for a later start that tracks again."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


class WandbTracker:
    """One W&B run, kept under `run_dir/wandb/`; offline it needs neither account nor network.

    Its id is kept in `run_dir/wandb_run_id`, so a resumed run continues the same W&B run; run_id is written there where
    the file is missing. Each offline session has a folder of its own; `wandb sync --append` uploads them as one run.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, settings: WandbSettings, run_id: str | None = None) -> None:
        import wandb
        from wandb.errors import Error as WandbError

        self._folder = run_dir / "wandb"
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            self.run_id: str | None = _run_id(run_dir, run_id or settings.trial)
        online = settings.mode == "online"
        if online and not _has_login(wandb.setup().settings.base_url):
            raise ValueError(_NO_LOGIN.format(what="no W&B login found"))
        # Not W&B's git state but ours, in the config: without the remote's address, which may hold a password.
        # Nor the command line, whose overrides may hold one too.
        quiet = wandb.Settings(
            console="off", silent=not online, disable_git=True, save_code=False, x_disable_meta=True
        )  # fmt: skip
        try:
            with writing(self._folder, _NO_ROOM):
                self._run = wandb.init(
                    mode="online" if online else "offline", dir=str(run_dir), id=self.run_id,
                    resume="allow" if online else None,  # offline, the id alone joins the sessions
                    # Project and entity of a sweep's trial are the sweep's own.
                    **({} if settings.trial else {"project": settings.project, "entity": settings.entity}),
                    name=settings.run_name, group=settings.group, tags=settings.tags,
                    notes=public_text(settings.notes or "") or None,
                    config={**public_dict(recipe), "git": git_state(Path.cwd())}, settings=quiet,
                )  # fmt: skip
        except WandbError as error:
            raise ValueError(_NO_LOGIN.format(what=f"W&B did not start ({error})")) from error

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record numbers of a step. Steps never decrease; several calls for one step are merged. Raise OutputError."""
        with writing(self._folder, _NO_ROOM):
            numbers = {key: value for key, value in metrics.items() if value is not None and key != "step"}
            self._run.log(numbers, step=step)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; an exit code other than 0 marks it as failed, STOPPED as one that will be resumed."""
        if exit_code == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


_NO_ROOM = "make room, or use track.wandb=off, then start again"
_NO_LOGIN = "track.wandb: online, but {what}; run `wandb login`, set WANDB_API_KEY, or use track.wandb=offline"


def open_tracker(recipe: Recipe, run_dir: Path, rank: int, run_id: str | None = None) -> SilentTracker | WandbTracker:
    """Start tracking on rank 0; every other rank, and `track.wandb: off`, gets a SilentTracker.

    Raises ValueError, before any prompt, where `online` is asked for and no login is found, or W&B refuses to start.
    """
    if rank != 0 or (settings := wandb_settings(recipe)).mode == "off":
        return SilentTracker(run_id)
    return WandbTracker(recipe, run_dir, settings, run_id)


def _run_id(run_dir: Path, known: str | None) -> str:
    file = run_dir / "wandb_run_id"
    if not file.is_file():
        file.write_text((known or secrets.token_hex(4)) + "\n", encoding="utf-8")
    run_id = file.read_text(encoding="utf-8").strip()
    if not (run_id.isascii() and run_id.isalnum() and len(run_id) <= 64):
        raise ValueError(f"{file}: {run_id[:64]!r} is not a W&B run id; delete the file to start a new W&B run")
    return run_id


def _has_login(base_url: str) -> bool:
    """Return whether W&B finds credentials without a prompt: in the environment, or in a netrc file (`wandb login`)."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).hostname or "api.wandb.ai"
    for file in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        try:
            if file and netrc.netrc(str(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout around `folder` and whether tracked files differ; None without git."""
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            answer = subprocess.run(
                ["git", "--no-optional-locks", *command], cwd=folder, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode:
            return None
        answers.append(answer.stdout.strip())
    return {"commit": answers[0], "dirty": bool(answers[1])}
