"""A run killed at any moment, on one or several ranks, resumes as if it had not been killed."""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3vl_train.checkpoint.manifest import checkpoint_folder, latest_checkpoint
from qwen3vl_train.config import Recipe, run_dir, save_recipe
from qwen3vl_train.tracking.metrics import read_metrics
from qwen3vl_train.train.loop import train
from tests.helpers import faults, launchers, small_runs
from tests.helpers.ranks import RankFailure, run_ranks
from tests.helpers.small_runs import in_child, losses


@pytest.fixture(scope="module")
def many(task: Path) -> Path:
    """A folder with 26 rows, 6 of them with pictures: an epoch of several steps of four packs."""
    rows = []
    for number in range(26):
        images = [f"images/{number}-0.png"] if (task / "images" / f"{number}-0.png").is_file() else []
        rows.append(
            small_runs.row(f"Question {number}? {'Why? ' * (number % 5)}", "So it is. " * (1 + number % 3), images)
        )
    small_runs.write_rows(task / "many.jsonl", rows)
    return task


def _recipe(small: Path, task: Path, out: Path, **overrides) -> Recipe:
    case = {"tune": small_runs.LORA, "checkpoint": {"every_steps": 2, "keep_last": 1}, **overrides}
    return small_runs.make_recipe(small, task, out, **case)


@pytest.fixture(scope="module")
def straight(small: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    return train(_recipe(small, task, tmp_path_factory.mktemp("straight")))


# ---- one process, each stage of a save, and the loader


# Where a run is killed while it saves step 4 -> the newest checkpoint that is then on disk.
MOMENTS = {
    "before the save": 2,
    "folder made": 2,
    "before the manifest": 2,
    "before the rename": 2,
    "after the rename": 4,
    "older one half removed": 4,
    "after the save": 4,
}


@pytest.mark.parametrize("moment", [*MOMENTS, "in the loader"])
def test_killed_at_a_stage_of_the_save(small: Path, task: Path, tmp_path: Path, straight: Path, moment: str):
    recipe = _recipe(small, task, tmp_path)

    def work() -> None:
        faults.finish_saves(2)
        if moment == "in the loader":
            faults.kill_at_row(7)
        else:
            faults.kill_in_save(moment, 4)
        train(recipe)

    assert in_child(work) == -9
    folder = tmp_path / "run"
    assert latest_checkpoint(folder) == checkpoint_folder(folder, MOMENTS.get(moment, 2))
    partial = folder / "checkpoints" / ".step-00000004.partial"
    assert partial.exists() == (moment in ("folder made", "before the manifest", "before the rename"))
    assert bool(list(partial.rglob("*.safetensors"))) == (moment in ("before the manifest", "before the rename"))
    train(recipe)
    assert losses(folder) == losses(straight)
    small_runs.assert_same_tensors(small_runs.final_tensors(folder), small_runs.final_tensors(straight))
    assert [left.name for left in (folder / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_worker_that_dies_ends_the_run_which_can_resume(small: Path, task: Path, tmp_path: Path, straight: Path):
    recipe = _recipe(small, task, tmp_path, data__num_workers=1)

    def work() -> None:
        faults.finish_saves(2)
        faults.kill_at_row(7)  # workers inherit it: the process that reads is the worker, and it dies
        with pytest.raises(RuntimeError, match="worker"):
            train(recipe)

    assert in_child(work) == 0
    train(recipe)
    assert losses(tmp_path / "run") == losses(straight)


# ---- ranks

DRIVER = """
import os, sys, time
from pathlib import Path
from qwen3vl_train.train.cli import sft
from tests.helpers import faults

folder, rank, start = Path(sys.argv[2]), os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
victims = sys.argv[3 + start].split(",")

def die(step):
    if step == 4 and rank in victims:
        while not (folder / "run" / "checkpoints" / "step-00000002").exists():
            time.sleep(0.02)
        (folder / f"killed-{start}-{rank}").write_text(str(time.time()))
        faults.kill_self()

def note(step, packs):
    back = folder / f"back-{start}-{rank}"
    if not back.exists():
        back.write_text(f"{step} {time.time()}")

faults.around_steps(before=die, after=note)
sys.exit(sft([sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def straight_on_two(small: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of two uninterrupted ranks, by engine."""
    out = tmp_path_factory.mktemp("straight")
    for engine in ("ddp", "fsdp2"):
        run_ranks(small_runs.train_on_rank, 2, _ranks_recipe(small, many, out / engine, engine))
    return {engine: losses(out / engine / "run") for engine in ("ddp", "fsdp2")}


def _ranks_recipe(small: Path, many: Path, out: Path, engine: str = "single", **overrides) -> Recipe:
    return _recipe(
        small,
        many,
        out,
        data={"train": [{"path": str(many / "many.jsonl")}], "max_tokens_per_pack": 72, "num_workers": 0},
        train={"num_epochs": 1, "packs_per_step": 4},
        **{"parallel": {"engine": engine}, **overrides},
    )


@pytest.mark.parametrize(("engine", "victims"), [("fsdp2", ["1", "0,1"]), ("ddp", ["0"])])
def test_torchrun_restarts_killed_ranks(
    small: Path, many: Path, tmp_path: Path, straight_on_two: dict[str, list[float]], engine: str, victims: list[str]
):
    """victims: the ranks that are killed at the same step of each start."""
    recipe = _ranks_recipe(small, many, tmp_path, engine)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(len(victims))),
        *("--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *(str(tmp_path / "driver.py"), str(tmp_path / "recipe.yaml"), str(tmp_path), *victims, "none"),
    ]
    done = launchers.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    for start, ranks in enumerate(victims):
        killed = [float((tmp_path / f"killed-{start}-{rank}").read_text()) for rank in ranks.split(",")]
        for rank in (0, 1):
            step, back = (tmp_path / f"back-{start + 1}-{rank}").read_text().split()
            assert int(step) == 3, f"start {start + 1}, rank {rank}: from the checkpoint of step 2"
        print(f"rank {ranks} of 2 under {engine}: first step done {float(back) - min(killed):.1f} s after the kill")
    assert losses(tmp_path / "run") == straight_on_two[engine]


def _wait_for_checkpoint(recipe: Recipe, step: int) -> None:
    deadline = time.monotonic() + 900
    while not checkpoint_folder(run_dir(recipe), step).exists():
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.02)


SHARDED = {"fsdp2": (2, {"engine": "fsdp2"}), "hsdp": (4, {"engine": "fsdp2", "replicate": 2})}


def _dies_in_a_sharded_save(rank: int, world_size: int, recipe: Recipe, victim: int) -> None:
    """The victim has written its shards of step 4 and dies before it reports them."""
    if rank == victim:

        def die(folder: Path, pieces: list[Path]) -> None:
            if "step-00000004" in str(folder):
                assert all(file.stat().st_size for file in pieces)
                faults.kill_self()

        faults.before_checksums(die)
    train(recipe)


@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED)
def test_a_rank_killed_within_a_sharded_save_changes_nothing(small: Path, many: Path, tmp_path: Path, case):
    world_size, parallel = case

    def recipe(out: str) -> Recipe:
        return _ranks_recipe(small, many, tmp_path / out, parallel=parallel)

    run_ranks(small_runs.train_on_rank, world_size, recipe("straight"))
    with pytest.raises(RankFailure, match="rank 1 died without a word, exit code -9"):
        run_ranks(_dies_in_a_sharded_save, world_size, recipe("killed"), 1)
    killed = tmp_path / "killed" / "run"
    assert latest_checkpoint(killed) == checkpoint_folder(killed, 2)
    assert (killed / "checkpoints" / ".step-00000004.partial").is_dir()
    run_ranks(small_runs.train_on_rank, world_size, recipe("killed"))
    assert losses(killed) == losses(tmp_path / "straight" / "run")
    expected = small_runs.final_tensors(tmp_path / "straight" / "run")
    small_runs.assert_same_tensors(small_runs.final_tensors(killed), expected)


def _logging_samples(rank: int, world_size: int, recipe: Recipe, log: Path, die_at: int | None) -> None:
    def die(step: int) -> None:
        if step == die_at:
            _wait_for_checkpoint(recipe, 2)
            faults.kill_self()

    def note(step: int, packs: list) -> None:
        with (log / f"{world_size}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "samples": [s for pack in packs for s in pack.sample_ids]}) + "\n")

    faults.around_steps(before=die, after=note)
    train(recipe)


def _logged(log: Path) -> Iterator[tuple[int, str]]:
    for file in log.iterdir():
        for line in map(json.loads, file.read_text().splitlines()):
            yield from ((line["step"], sample) for sample in line["samples"])


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, "fsdp2"), (1, "single")), ((2, "ddp"), (4, "fsdp2")), ((4, "fsdp2"), (2, "ddp"))],
    ids=["2-1", "2-4", "4-2"],
)
def test_on_other_ranks_every_sample_of_the_epoch_is_seen_once(
    small: Path, many: Path, tmp_path: Path, straight_on_two: dict[str, list[float]], first, second
):
    (log := tmp_path / "log").mkdir()
    arguments = _ranks_recipe(small, many, tmp_path, first[1]), log, 4
    with pytest.raises(RankFailure, match="died without a word, exit code -9"):
        run_ranks(_logging_samples, first[0], *arguments)
    folder = tmp_path / "run"
    assert latest_checkpoint(folder) == folder / "checkpoints" / "step-00000002"
    before = [sample for step, sample in _logged(log) if step <= 2]  # what the checkpoint holds; step 3 was lost
    for file in log.iterdir():
        file.unlink()
    arguments = _ranks_recipe(small, many, tmp_path, second[1]), log, None
    if second[0] == 1:
        assert in_child(lambda: _logging_samples(0, 1, *arguments)) == 0
    else:
        run_ranks(_logging_samples, second[0], *arguments)
    after = [sample for _, sample in _logged(log)]
    assert sorted([*before, *after]) == sorted(f"many.jsonl:{row}" for row in range(1, 27))
    assert len(before) > 3
    assert len(after) > 3
    # Sums in another order on other ranks: 1e-7 of a loss.
    assert losses(folder) == pytest.approx(straight_on_two["ddp"], rel=1e-5)


# ---- at random


def _rank_with_pid(rank: int, world_size: int, recipe: Recipe, pids: Path) -> None:
    (pids / str(rank)).write_text(str(os.getpid()))
    train(recipe)


def _kill_one(pids: Path, rank: int, seconds: float) -> None:
    time.sleep(seconds)
    if (file := pids / str(rank)).is_file():
        os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "engine"), [(1, "single"), (2, "fsdp2")])
def test_fifteen_kills_at_random_moments(small: Path, many: Path, tmp_path: Path, world_size: int, engine: str):
    """30 in both cases: whatever moment they fall on, the series of losses is that of a run never stopped."""

    def recipe(out: str) -> Recipe:
        case = {"checkpoint": {"every_steps": 1, "keep_last": 2}, "model__dtype": "bfloat16"}
        return _ranks_recipe(small, many, tmp_path / out, engine, **case).model_copy(
            update={"train": _ranks_recipe(small, many, tmp_path, engine).train.model_copy(update={"num_epochs": 6})}
        )

    (pids := tmp_path / "pids").mkdir()
    started = time.monotonic()
    run_ranks(_rank_with_pid, world_size, recipe("straight"), pids)
    expected, seconds = losses(tmp_path / "straight" / "run"), time.monotonic() - started
    generator, kills, runs, steps = random.Random(world_size), 0, 0, []
    while kills < 15:
        runs += 1
        out, done = f"killed-{runs}", False
        while not done:
            for file in pids.iterdir():
                file.unlink()
            if kills < 15:
                arguments = pids, generator.randrange(world_size), generator.uniform(0.0, 0.7 * seconds)
                threading.Thread(target=_kill_one, args=arguments, daemon=True).start()
            try:
                run_ranks(_rank_with_pid, world_size, recipe(out), pids)
                done = True
            except RankFailure as failure:
                if "exit code -9" not in str(failure):
                    raise
                kills += 1
                file = tmp_path / out / "run" / "metrics.jsonl"
                steps.append(len(read_metrics(file)) if file.is_file() else 0)
        assert losses(tmp_path / out / "run") == expected
    print(f"{world_size} ranks, {engine}: {kills} kills after steps {steps} of {len(expected)}, {runs} runs, all equal")
