"""`train(recipe)`: open a run, resume it, and loop: take, step, log, evaluate, save."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from qwen3vl_train import __version__
from qwen3vl_train.arch import Qwen3VLArch
from qwen3vl_train.checkpoint.hub_model import with_local_model
from qwen3vl_train.checkpoint.manifest import EXPORTS, KeepPolicy, read_manifest
from qwen3vl_train.checkpoint.start_from import check_start, load_start, resolve_start
from qwen3vl_train.checkpoint.writer import CheckpointWriter, load_checkpoint
from qwen3vl_train.config import Recipe, check_world_size, run_dir
from qwen3vl_train.config.fields import CheckpointSection, EvalSection
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.loader import StepPacks
from qwen3vl_train.data.rejects import RejectSummary
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.rendezvous import start_ranks
from qwen3vl_train.dist.stop import StopRequest, StopSignals
from qwen3vl_train.dist.watchdog import Watchdog
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.outputs import OutputError
from qwen3vl_train.parallel.optim import TrainEngine
from qwen3vl_train.tracking.console import resume_lines, start_banner
from qwen3vl_train.tracking.metrics import StepTally, StepTimes
from qwen3vl_train.tracking.rank_log import rank_log
from qwen3vl_train.tracking.recorder import Recorder
from qwen3vl_train.train.build import build_engine, check_replicas, describe
from qwen3vl_train.train.consistency import check_same_folder, check_same_weights
from qwen3vl_train.train.data import TrainingData, gather_rejects, open_data
from qwen3vl_train.train.evaluate import evaluate_loss
from qwen3vl_train.train.export import export_while_training
from qwen3vl_train.train.run_folder import OpenedFolder, claim_run_folder, locked_run_folder, open_run_folder
from qwen3vl_train.train.step import StepOptions, lr_factor, train_step
from qwen3vl_train.train.tune import GradientCheck, check_media_reach, report_groups


@dataclass
class Progress:
    """How far a run is."""

    step: int  # steps done
    updates: int  # those of them that changed weights; a step without a label does not
    loader_state: dict[str, Any]  # position of the loader after these steps

    def advance(self, tally: StepTally, loader_state: dict[str, Any]) -> None:
        self.step = tally.step
        self.updates += tally.label_tokens > 0
        self.loader_state = loader_state


@dataclass
class Run:
    """A run before its next step."""

    recipe: Recipe
    ranks: Ranks
    watchdog: Watchdog
    opened: OpenedFolder
    check_lock: Callable[[], None]  # raises where another job has taken the folder over
    manifest: dict[str, Any]  # of the checkpoint that it resumes from, {} where it starts
    base: int  # fingerprint of the base weights
    start: str | None  # a line about the weights that it starts from, where they are not the base's alone
    data: TrainingData
    model: Qwen3VLForConditionalGeneration
    optimizer: TrainEngine
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.opened.path

    def checked(self, steps: Iterator[StepPacks]) -> Iterator[StepPacks]:
        """Yield the steps, or raise where another job has taken the run folder over."""
        for packs in steps:
            self.check_lock()
            yield packs


def train(recipe: Recipe) -> Path:
    """Train as the recipe says, from the start or from the last checkpoint. Returns the run folder.

    Every rank calls it; without torchrun there is one. Raises ValueError for what the user can fix (recipe, data, model
    folder), RuntimeError for what went wrong while training (non-finite numbers, a full disk), and StopRequest after a
    signal asked the run to stop and it has saved.
    """
    timeout = recipe.parallel.timeout_seconds
    ranks = start_ranks(timeout_seconds=timeout, nccl_trace_prefix=str(run_dir(recipe) / "logs" / "nccl_trace_rank_"))
    check_world_size(recipe, ranks.world_size)
    with Watchdog(ranks, timeout) as watchdog, locked_run_folder(recipe, ranks) as check_lock:
        ranks.on_main(lambda: with_local_model(recipe, ranks.heartbeat).model.path)
        recipe = ranks.on_all(partial(with_local_model, recipe))  # ranks of other machines have caches of their own
        if recipe.train.deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(recipe.train.deterministic)  # imports torch's compiler: takes seconds
        run = _open_run(recipe, ranks, watchdog, check_lock)
        keep = recipe.checkpoint
        policy = KeepPolicy(keep.keep_last, keep.keep_every_steps, keep.keep_best, keep.keep_optimizer)
        with (
            rank_log(run.folder, ranks) as out,
            Recorder(
                run.recipe, run.folder, ranks, out,
                num_steps=run.data.num_steps, start_step=run.progress.step,
                wandb_run_id=run.manifest.get("wandb_run_id"),
            ) as recorder,
            StopSignals() as stop,
            CheckpointWriter(run.folder, ranks, policy, timeout_seconds=timeout, report=recorder.line) as writer,
        ):  # fmt: skip
            _loop(run, recorder, stop, writer)
    return run.folder


def _open_run(recipe: Recipe, ranks: Ranks, watchdog: Watchdog, check_lock: Callable[[], None]) -> Run:
    """Open folder, data, model and optimizer, and bring them to the last checkpoint. Every rank must call it."""
    recipe = ranks.on_all(lambda: resolve_start(recipe))
    base = check_same_weights(recipe.model.path, ranks)
    # Rank 0 reads the folder for all ranks, so that all have the same view of it.
    opened = ranks.on_main(lambda: open_run_folder(recipe, base))
    folder, checkpoint, start = opened.path, opened.checkpoint, None
    if recipe.tune.start_from is not None and checkpoint is None:
        ranks.on_main(lambda: check_start(recipe, base))
    check_same_folder(folder, ranks)
    manifest = read_manifest(checkpoint) if checkpoint else {}
    progress = Progress(manifest.get("step", 0), manifest.get("updates", 0), manifest.get("loader", {}))
    data = open_data(recipe, ranks, loader_state=manifest.get("loader"))
    data.rejects.resume(manifest.get("rejects"), ranks.on_main)
    watchdog.heartbeat(progress.step)
    if not data.is_streamed and not data.index.visual_tokens.any() and data.index.num_usable:
        check_media_reach(
            describe(Qwen3VLArch.from_pretrained(recipe.model.path), recipe),
            recipe,
            f"none of the {data.index.num_usable:,} samples",
        )
    model, optimizer = build_engine(recipe, ranks)
    model.train()
    watchdog.heartbeat(progress.step)
    if checkpoint:
        load_checkpoint(checkpoint, state := optimizer.state_tensors())
        optimizer.load_state_dict(state, num_updates=progress.updates)
    elif recipe.tune.start_from is not None:
        state = optimizer.state_tensors()
        start = load_start(recipe, state)
        optimizer.load_state_dict(state, num_updates=0)
    check_replicas(optimizer, ranks)

    def claim() -> None:
        check_lock()
        claim_run_folder(folder, recipe, checkpoint)

    ranks.on_main(claim)
    watchdog.heartbeat(progress.step)
    return Run(recipe, ranks, watchdog, opened, check_lock, manifest, base, start, data, model, optimizer, progress)


def _loop(run: Run, recorder: Recorder, stop: StopSignals, writer: CheckpointWriter) -> None:
    """Train to the last step. Every rank must call it."""
    recipe, ranks, data, progress = run.recipe, run.ranks, run.data, run.progress
    start_step, num_steps = progress.step, data.num_steps
    for line in _start_lines(run):
        recorder.line(line)
    factor_at = partial(lr_factor, num_steps=num_steps, optim=recipe.optim)
    steps, options = run.checked(iter(data.loader)), StepOptions.from_recipe(recipe, run.model)
    gradient_check = GradientCheck(run.model)
    while progress.step < num_steps:
        started = time.perf_counter()
        packs, status, wait_seconds = data.take(
            steps, ranks, stop_requested=stop.received or _unwritten(run, recorder) is not None,
            save_failed=writer.failed(),
        )  # fmt: skip
        if status.save_failed:
            writer.wait()  # raises on every rank
        if status.stop_requested and progress.step > start_step:
            _save_and_stop(run, recorder, writer)
        if data.is_streamed and progress.step == 0 and packs.num_packs and not packs.window_patches:
            check_media_reach(run.model, recipe, f"none of the first {packs.num_seen:,} rows")
        factor = factor_at(progress.step)
        tally = train_step(run.model, run.optimizer, packs, ranks, options, step=progress.step, lr_factor=factor)
        progress.advance(tally, packs.state)
        if checked := gradient_check.after_step(tally, run.optimizer.params_with_grad, ranks):
            recorder.line(checked)
        rejects = data.rejects.add(packs.rejected, num_seen=packs.num_seen if data.is_streamed else None)
        times = StepTimes(time.perf_counter() - started, wait_seconds, writer.pop_stall_seconds())
        recorder.step(tally, packs, times, num_rejected=len(data.rejects))
        run.watchdog.heartbeat(progress.step)
        last = progress.step == num_steps
        losses: dict[str, float] = {}
        epoch = packs.epoch + 1 if packs.ends_epoch else None
        if last or (_due(recipe.eval, progress.step, epoch) and not ranks.any(stop.received)):
            losses, more_rejects = _evaluate(run, recorder)
            rejects += more_rejects
        for reject in RejectSummary(rejects).lines():
            recorder.line(f"rejected: {reject}")
        keep = recipe.checkpoint
        if (last and keep.save_last) or _due(keep, progress.step, epoch):
            _save(run, recorder, writer, losses)
        due = _every(keep.export_every_steps, progress.step) or _every(keep.export_every_epochs, epoch)
        if due and (last or not ranks.any(stop.received)):
            _export(run, recorder, writer)
        if rejects:  # after the checkpoint: what has been trained is kept
            data.rejects.check()
    writer.wait()
    if warning := gradient_check.unreached():
        recorder.line(warning)
    _check_written(run, recorder, writer)


def _start_lines(run: Run) -> list[str]:
    data_lines = run.data.summary() + run.data.length_lines(run.recipe)
    lines = start_banner(run.recipe, run.ranks, run.folder, data_lines, report_groups(run.model, run.recipe))
    lines += [run.start] if run.start else []
    return lines + resume_lines(run.progress.step, run.data.num_steps, run.opened.damaged, run.opened.changes)


def _save_and_stop(run: Run, recorder: Recorder, writer: CheckpointWriter) -> NoReturn:
    """Save the steps done so far, unless that is done already, and raise StopRequest. Every rank must call it."""
    if writer.last_step != run.progress.step:
        _save(run, recorder, writer, {})
    writer.wait()
    _check_written(run, recorder, writer)
    raise StopRequest(f"{run.folder}: asked to stop, saved after step {run.progress.step}; start it again to continue")


def _export(run: Run, recorder: Recorder, writer: CheckpointWriter) -> None:
    target = run.folder / EXPORTS / f"step-{run.progress.step:08d}"
    seconds = export_while_training(run.recipe, run.model, target, run.ranks)
    recorder.line(f"export step {run.progress.step}: written in {seconds:.1f} s, {target}")
    writer.prune_exports()


def _unwritten(run: Run, recorder: Recorder) -> OutputError | None:
    """Return the first error of writing beside the checkpoints on this rank."""
    return recorder.failure or run.data.rejects.failure


def _check_written(run: Run, recorder: Recorder, writer: CheckpointWriter) -> None:
    """Save, and raise RuntimeError on every rank, where one could not write. Every rank must call it."""
    failure = _unwritten(run, recorder)
    messages = [message for message in run.ranks.gather(None if failure is None else str(failure)) if message]
    if messages:
        if run.progress.step > max(writer.last_step or 0, run.manifest.get("step", 0)):
            _save(run, recorder, writer, {})
            writer.wait()
        raise RuntimeError(f"{messages[0]} (saved after step {run.progress.step})") from failure


def _evaluate(run: Run, recorder: Recorder) -> tuple[dict[str, float], list[Reject]]:
    """Return the held-out losses by name, and the rows that broke on any rank while they were decoded."""
    ranks, step = run.ranks, run.progress.step
    losses: dict[str, float] = {}
    new_rejects: list[Reject] = []
    heartbeat = partial(run.watchdog.heartbeat, step)
    for name, open_packs in run.data.evals.items():
        started = time.perf_counter()
        rejects: list[Reject] = []
        packs = open_packs(rejects)
        result = evaluate_loss(run.model, packs, ranks, lockstep=run.optimizer.lockstep, each=heartbeat)
        recorder.evaluation(step, name, result.loss, result.label_tokens, time.perf_counter() - started)
        if ranks.any(bool(rejects)):
            new_rejects += run.data.rejects.add(gather_rejects(rejects, ranks))
        losses[name] = result.loss
    return losses, new_rejects


def _save(run: Run, recorder: Recorder, writer: CheckpointWriter, losses: dict[str, float]) -> None:
    """Begin to write a checkpoint. losses: held-out ones of this step, by name."""
    manifest = {
        "base": run.base,
        "loader": run.progress.loader_state,
        "updates": run.progress.updates,
        "rejects": run.data.rejects.state(),
        "eval": losses,
        "engine": run.recipe.parallel.engine,
        "world_size": run.ranks.world_size,
        "wandb_run_id": recorder.wandb_run_id,
        "versions": {"qwen3vl_train": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    writer.start(run.progress.step, run.optimizer.state_tensors, manifest)


def _due(when: CheckpointSection | EvalSection, step: int, epoch: int | None) -> bool:
    """Return whether something is due after this step. epoch: epochs done where the step ends one, else None."""
    return _every(when.every_steps, step) or _every(when.every_epochs, epoch)


def _every(interval: int | None, number: int | None) -> bool:
    return interval is not None and number is not None and number % interval == 0
