"""`train(recipe)`: builds model, data and optimizer, then loops."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3vl_train.checkpoint.manifest import KeepPolicy, read_record
from qwen3vl_train.checkpoint.writer import CheckpointWriter, load_checkpoint
from qwen3vl_train.config import Recipe, check_world_size, run_dir
from qwen3vl_train.data.errors import Reject
from qwen3vl_train.data.packing.steps import StepPacks
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.rendezvous import start_ranks
from qwen3vl_train.dist.stop import StopRequest, StopSignals
from qwen3vl_train.dist.tensors import global_shape
from qwen3vl_train.dist.watchdog import Watchdog
from qwen3vl_train.model.costs import FlopsCounter
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration
from qwen3vl_train.parallel.optim import Optimizer
from qwen3vl_train.tracking.loss_by_source import source_names
from qwen3vl_train.tracking.metrics import StepTally
from qwen3vl_train.tracking.rank_log import rank_log
from qwen3vl_train.train.build import build_engine, check_replicas
from qwen3vl_train.train.consistency import check_same_folder, check_same_weights
from qwen3vl_train.train.data import TrainingData, open_data
from qwen3vl_train.train.evaluate import evaluate_loss
from qwen3vl_train.train.export import export_while_training
from qwen3vl_train.train.record import Recorder
from qwen3vl_train.train.report import start_report
from qwen3vl_train.train.run_folder import REJECTED_FILE, claim_run_folder, open_run_folder, restart_rejects, versions
from qwen3vl_train.train.schedule import lr_factor
from qwen3vl_train.train.step import train_step
from qwen3vl_train.train.tune import GradientCheck


def train(recipe: Recipe) -> Path:
    """Train as the recipe says, from its start or its last checkpoint. Returns the run folder.

    Every rank calls it; without torchrun there is one. Raises ValueError for what the user can mend (recipe, data,
    model folder), RuntimeError for what went wrong on the way (non-finite numbers, a full disk), StopRequest after a
    signal asked the run to stop and it has saved.
    """
    nccl_trace_prefix = str(run_dir(recipe) / "logs" / "nccl_trace_rank_")
    ranks = start_ranks(timeout_seconds=recipe.parallel.timeout_seconds, nccl_trace_prefix=nccl_trace_prefix)
    with Watchdog(ranks, recipe.parallel.timeout_seconds) as watch:
        return _train(recipe, ranks, watch)


@dataclass
class _Run:
    """A run that stands before its next step. record: of the checkpoint it goes on from, {} where it begins.

    damaged: what is wrong with newer checkpoints. updates: steps that moved weights; one without a label does not.
    """

    folder: Path
    record: dict[str, Any]
    damaged: list[str]
    data: TrainingData
    model: Qwen3VLForConditionalGeneration
    optimizer: Optimizer
    step: int
    updates: int


def _open_run(recipe: Recipe, ranks: Ranks, watch: Watchdog) -> _Run:
    """Open folder, data, model and optimizer, and bring them to the last checkpoint. Every rank must call it."""
    # Rank 0 looks at the folder for all, so that none sees it a moment earlier or later than the others.
    folder, checkpoint, damaged = ranks.on_main(lambda: open_run_folder(recipe))
    check_same_folder(folder, ranks)
    check_same_weights(recipe.model.path, ranks)
    record = read_record(checkpoint) if checkpoint else {}
    data = open_data(recipe, ranks, loader_state=record.get("loader"))
    saved = record.get("rejects", {"listed": 0, "of_streams": 0})
    listed = ranks.on_main(
        lambda: restart_rejects(folder / REJECTED_FILE, data.found_rejects(), num_saved=saved["listed"])
    )
    data.check_rejects()
    # Behind the check: what broke before a stop counts on, but does not keep a run from going on once it is mended.
    data.load_rejects(saved, listed)
    step, updates = record.get("step", 0), record.get("updates", 0)
    watch.heartbeat(step)
    model, optimizer = build_engine(recipe, ranks)
    model.train()
    watch.heartbeat(step)
    if checkpoint:
        load_checkpoint(checkpoint, state := optimizer.state_tensors())
        optimizer.loaded(state, num_updates=updates)
    check_replicas(optimizer, ranks)
    ranks.on_main(lambda: claim_run_folder(folder, recipe, checkpoint))
    watch.heartbeat(step)
    return _Run(folder, record, damaged, data, model, optimizer, step, updates)


def _train(recipe: Recipe, ranks: Ranks, watch: Watchdog) -> Path:
    check_world_size(recipe, ranks.world_size)
    if recipe.train.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(recipe.train.deterministic)  # imports torch's compiler, seconds of start-up
    run = _open_run(recipe, ranks, watch)
    folder, data, keep = run.folder, run.data, recipe.checkpoint
    policy = KeepPolicy(keep.keep_last, keep.keep_every_steps, keep.keep_best)
    with (
        rank_log(folder, ranks) as out,
        Recorder(
            recipe, folder, ranks, out,
            num_steps=data.num_steps, start_step=run.step, wandb_run_id=run.record.get("wandb_run_id"),
        ) as recorder,
        StopSignals() as stop,
        CheckpointWriter(
            folder, ranks, policy, timeout_seconds=recipe.parallel.timeout_seconds, tell=recorder.line
        ) as writer,
    ):  # fmt: skip
        for line in start_report(recipe, ranks, run.model, data, folder, run.step, run.damaged):
            recorder.line(line)
        take_step = _stepper(recipe, ranks, run, recorder)
        stall = 0.0
        while run.step < data.num_steps:
            packs, broken = take_step(stall)
            stall = 0.0
            watch.heartbeat(run.step)
            stopping, refused = _urgent(stop, writer, ranks)
            if refused:
                writer.wait()
            last = run.step == data.num_steps
            losses: dict[str, float] = {}
            if last or (_every(recipe.eval.every_steps, run.step) and not stopping):
                losses, rejected = _evaluate(run, ranks, recorder, watch)
                broken += rejected
            recorder.rejected(broken)
            if last or stopping or _every(keep.every_steps, run.step):
                asked = time.perf_counter()
                state = _state(recipe, ranks, run, recorder, packs.state, losses)
                writer.start(run.step, run.optimizer.state_tensors(), state)
                stall = time.perf_counter() - asked
            if stopping and not last:
                writer.wait()
                raise StopRequest(f"{folder}: asked to stop, saved after step {run.step}; start it again to go on")
            if _every(keep.export_every_steps, run.step):
                if stopping:
                    writer.wait()  # what cannot be made again comes first
                target = folder / "export" / f"step-{run.step:08d}"
                seconds = export_while_training(recipe, run.model, target, ranks)
                recorder.line(f"export step {run.step}: written in {seconds:.1f} s, {target}")
            if broken:  # after the checkpoint: what has been trained is kept
                writer.wait()
                data.check_rejects()
        writer.wait()
    return folder


def _stepper(
    recipe: Recipe, ranks: Ranks, run: _Run, recorder: Recorder
) -> Callable[[float], tuple[StepPacks, list[Reject]]]:
    """Return a function that takes the next step and records it: (stall by the last checkpoint) -> (its packs, rows
    that turned out broken).
    """
    data, optim = run.data, recipe.optim
    batches, sources = iter(data.loader), source_names(recipe)
    flops = FlopsCounter.from_model(run.model, run.model.arch, lambda parameter: global_shape(parameter).numel())
    gradient_check = GradientCheck(run.model)

    def take_step(stall: float) -> tuple[StepPacks, list[Reject]]:
        started = time.perf_counter()
        packs, waited = data.take(batches, ranks)
        factor = lr_factor(run.step, num_steps=data.num_steps, warmup_steps=optim.warmup_steps, schedule=optim.schedule)
        sums = train_step(
            run.model, run.optimizer, packs.packs, packs.pack_numbers, ranks, flops,
            step=run.step, seed=recipe.train.seed, lr_factor=factor, max_grad_norm=optim.max_grad_norm,
            sources=sources,
        )  # fmt: skip
        run.step += 1
        run.updates += sums.label_tokens > 0
        checked = gradient_check.after_step(
            run.step, run.optimizer.touched,
            with_labels=sums.label_tokens > 0, with_media=sums.visual_tokens > 0, ranks=ranks,
        )  # fmt: skip
        if checked:
            recorder.line(checked)
        broken = data.add_rejects(packs.rejected)
        tally = StepTally(
            step=run.step,
            epoch=packs.epoch,
            loss=sums.loss,
            grad_norm=sums.grad_norms["all"],
            lr=optim.lr * factor,
            tokens=sums.tokens,
            label_tokens=sums.label_tokens,
            visual_tokens=sums.visual_tokens,
            patches=sums.patches,
            capacity=packs.num_packs * recipe.data.max_tokens_per_pack,
            flops=sums.flops,
            seconds=time.perf_counter() - started,
            data_wait_seconds=waited,
            rejected=len(data.rejects),
            checkpoint_stall_seconds=stall,
            dropped=packs.num_dropped,
            shrunk=packs.num_shrunk,
            rank_balance=packs.balance,
            sources=sums.sources,
        )
        recorder.step(tally, sums.grad_norms)
        return packs, broken

    return take_step


def _state(
    recipe: Recipe, ranks: Ranks, run: _Run, recorder: Recorder, loader: dict[str, Any], losses: dict[str, float]
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. loader: where it stands behind the step. losses: held out, by name."""
    return {
        "loader": loader,
        "updates": run.updates,
        "rejects": run.data.rejects_state(),
        "eval": losses,
        "engine": recipe.parallel.engine,
        "world_size": ranks.world_size,
        "wandb_run_id": recorder.wandb_run_id,
        "versions": versions(),
    }


def _urgent(stop: StopSignals, writer: CheckpointWriter, ranks: Ranks) -> tuple[bool, bool]:
    """Whether any rank was asked to stop, and whether a checkpoint could not be written; the same answer on all ranks.

    One message for both, after every step. A checkpoint that failed ends the run either way.
    """
    most = ranks.reduce([2.0 if writer.failed() else float(stop.received)], "max")[0]
    return most == 1.0, most == 2.0


def _evaluate(run: _Run, ranks: Ranks, recorder: Recorder, watch: Watchdog) -> tuple[dict[str, float], list[Reject]]:
    """Return the held-out losses by name, and the rows that broke on any rank while they were decoded."""
    losses: dict[str, float] = {}
    broken: list[Reject] = []
    for name, open_packs in run.data.evals.items():
        started = time.perf_counter()
        rejected: list[Reject] = []
        result = evaluate_loss(
            run.model,
            open_packs(rejected),
            ranks,
            lockstep=run.optimizer.lockstep,
            each=lambda: watch.heartbeat(run.step),
        )
        recorder.evaluation(run.step, name, result, time.perf_counter() - started)
        broken += run.data.share_rejects(rejected, ranks)
        losses[name] = result.loss
    return losses, broken


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
