"""`train(recipe)`: builds model, data and optimizer, then loops. The loop's whole state is the step."""

import time
from pathlib import Path

import torch

from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.checkpoint.run import read_record, read_tensors, save_checkpoint
from qwen3vl_train.config import Recipe, check_world_size
from qwen3vl_train.data.faults import Reject
from qwen3vl_train.dist import start_ranks
from qwen3vl_train.model.flops import FlopsCounter
from qwen3vl_train.parallel.ddp import same_on_all_ranks
from qwen3vl_train.train.data import open_data
from qwen3vl_train.train.evaluate import evaluate_loss
from qwen3vl_train.train.metrics import StepTally
from qwen3vl_train.train.optim import MasterAdamW, lr_factor
from qwen3vl_train.train.record import Recorder
from qwen3vl_train.train.report import start_report
from qwen3vl_train.train.run_folder import REJECTED_FILE, RejectLog, claim_run_folder, open_run_folder, versions
from qwen3vl_train.train.step import train_step
from qwen3vl_train.train.tune import GradientCheck, apply_tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(recipe: Recipe) -> Path:
    """Train as the recipe says, from its start or its last checkpoint. Returns the run folder.

    Every rank calls it; without torchrun there is one. Raises ValueError for what the user can mend (recipe, data,
    model folder), RuntimeError for what went wrong on the way (non-finite numbers, a full disk).
    """
    ranks = start_ranks()
    check_world_size(recipe, ranks.world_size)
    folder, checkpoint = open_run_folder(recipe)
    record = read_record(checkpoint) if checkpoint else None
    step = record["step"] if record else 0
    data = open_data(recipe, ranks, loader_state=record["loader"] if record else None)
    data.add_rejects(Reject(*fields) for fields in (record["rejects"] if record else []))
    RejectLog(folder / REJECTED_FILE, writes=ranks.is_main, fresh=not checkpoint).add(data.rejects)
    data.check_rejects()

    model = load_qwen3_vl_model(recipe.model.path, dtype=DTYPES[recipe.model.dtype], device=ranks.device)
    apply_tuning(model, recipe)
    model.train()
    optimizer = MasterAdamW(model, recipe.optim)
    if checkpoint:
        optimizer.load_state_tensors(read_tensors(checkpoint), num_updates=step)
    if not same_on_all_ranks([item.master for item in optimizer.trained], ranks.world_size):
        raise RuntimeError("ranks start from different weights; do they read the same model folder and checkpoint?")

    ranks.barrier()  # every rank has looked at the folder before the first one writes into it
    if ranks.is_main:
        claim_run_folder(folder, recipe)
    flops = FlopsCounter.of(model, model.arch)
    gradient_check = GradientCheck(model)
    with Recorder(recipe, folder, ranks, num_steps=data.num_steps, start_step=step) as recorder:
        for line in start_report(recipe, ranks, model, data, folder, step):
            recorder.line(line)
        batches = iter(data.loader)
        while step < data.num_steps:
            started = time.perf_counter()
            packs = next(batches)
            waited = time.perf_counter() - started
            factor = lr_factor(
                step, num_steps=data.num_steps, warmup_steps=recipe.optim.warmup_steps, schedule=recipe.optim.schedule
            )
            sums = train_step(
                model,
                optimizer,
                packs.packs,
                packs.pack_numbers,
                ranks,
                flops,
                step=step,
                seed=recipe.train.seed,
                lr_factor=factor,
                max_grad_norm=recipe.optim.max_grad_norm,
            )
            step += 1
            checked = gradient_check.after_step(
                step,
                optimizer.touched,
                with_labels=sums.label_tokens > 0,
                with_media=sums.visual_tokens > 0,
                ranks=ranks,
            )
            if checked:
                recorder.line(checked)
            recorder.rejected(data.share_rejects(packs.rejected, ranks))
            data.check_rejects()
            tally = StepTally(
                step=step,
                epoch=packs.epoch,
                loss=sums.loss,
                grad_norm=sums.grad_norms["all"],
                lr=recipe.optim.lr * factor,
                tokens=sums.tokens,
                label_tokens=sums.label_tokens,
                visual_tokens=sums.visual_tokens,
                patches=sums.patches,
                capacity=packs.num_packs * recipe.data.max_tokens_per_pack,
                flops=sums.flops,
                seconds=time.perf_counter() - started,
                data_wait_seconds=waited,
                rejected=len(data.rejects),
                dropped=packs.num_dropped,
                shrunk=packs.num_shrunk,
            )
            recorder.step(tally, sums.grad_norms)
            last = step == data.num_steps
            if last or _every(recipe.eval.every_steps, step):
                for name, open_packs in data.evals.items():
                    started = time.perf_counter()
                    broken: list[Reject] = []
                    result = evaluate_loss(model, open_packs(broken), ranks)
                    recorder.evaluation(step, name, result, time.perf_counter() - started)
                    recorder.rejected(data.share_rejects(broken, ranks))
            if last or _every(recipe.checkpoint.every_steps, step):
                if ranks.is_main:
                    state = {"loader": packs.state, "rejects": data.rejects, "versions": versions()}
                    save_checkpoint(folder, step, optimizer.state_tensors(), state, recipe.checkpoint.keep_last)
                ranks.barrier()
    return folder


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
