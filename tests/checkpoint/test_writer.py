"""Checkpoints are written while training continues, are complete or absent, and fit any engine and world size."""

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qwen3vl_train.checkpoint.manifest import KeepPolicy, checkpoint_folder, latest_checkpoint, read_manifest
from qwen3vl_train.checkpoint.writer import CheckpointWriter, load_checkpoint, read_tensors
from qwen3vl_train.config import Recipe
from qwen3vl_train.dist.ranks import Ranks
from qwen3vl_train.dist.tensors import shard_rows
from tests.helpers import engine_runs, faults, small_runs
from tests.helpers.engine_runs import FULL, LORA, Steps, engine_recipe
from tests.helpers.messages import message_of
from tests.helpers.ranks import run_ranks

RECORD: dict[str, Any] = {"updates": 0, "loader": {}, "rejects": []}
KEEP = KeepPolicy(keep_last=9)


def _state(value: float = 0.0, size: int = 1000) -> dict[str, Tensor]:
    return {"weight/a": torch.full((size, 3), value), "exp_avg/a": torch.arange(float(size)) + value}


def _save(run: Path, step: int, tensors: dict[str, Tensor], **options: Any) -> None:
    with CheckpointWriter(run, small_runs.ALONE, options.get("policy", KEEP)) as writer:
        writer.start(step, lambda: tensors, RECORD)
        writer.wait()


# ---- engines and ranks


def _pass_on(
    rank: int, world_size: int, recipes: list[Recipe], steps: Steps, run: Path, number: int
) -> list[tuple[dict[str, Tensor], float]]:
    """Load the last checkpoint, if any, save what was loaded as the next one, and give it with the loss of a step."""
    results = []
    for place, recipe in enumerate(recipes):
        folder, trainee = run / str(place), engine_runs.Trainee(rank, world_size, recipe)
        if number == 0:
            trainee.steps(steps, 0, 2)
        else:
            load_checkpoint(checkpoint_folder(folder, number), state := trainee.optimizer.state_tensors())
            trainee.optimizer.load_state_dict(state, num_updates=2)
        state = trainee.optimizer.state_tensors()
        with CheckpointWriter(folder, trainee.ranks, KEEP) as writer:
            writer.start(number + 1, lambda state=state: state, {**RECORD, "world_size": world_size})
            writer.wait()
        gathered = trainee.state()
        (loss,) = trainee.steps(steps, 2, 3)
        results.append((gathered if rank == 0 else {}, loss))
    return results


CHAIN = [
    (1, {"engine": "single"}),
    (2, {"engine": "fsdp2"}),
    (4, {"engine": "fsdp2", "replicate": 2}),
    (2, {"engine": "ddp"}),
    (4, {"engine": "fsdp2"}),
    (2, {"engine": "fsdp2"}),
    (1, {"engine": "single"}),
]


def test_a_checkpoint_goes_from_engine_to_engine_bit_for_bit(small: Path, steps: Steps, tmp_path: Path):
    """Each engine writes again what it has read: on 1, 2, 2 x 2, 2, 4, 2 ranks, and 1."""
    first: list[tuple[dict[str, Tensor], float]] = []
    for number, (world_size, parallel) in enumerate(CHAIN):
        arguments = [engine_recipe(small, tune, **parallel) for tune in (FULL, LORA)], steps, tmp_path / "runs", number
        if world_size == 1:
            passed = _pass_on(0, 1, *arguments)
        else:
            passed = run_ranks(_pass_on, world_size, *arguments)[0]
        first = first or passed
        for place, ((state, loss), (expected, expected_loss)) in enumerate(zip(passed, first, strict=True)):
            small_runs.assert_same_tensors(state, expected)
            folder = checkpoint_folder(tmp_path / "runs" / str(place), number + 1)
            small_runs.assert_same_tensors(read_tensors(folder), expected)
            assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of the next step in another order
        files = read_manifest(checkpoint_folder(tmp_path / "runs" / "0", number + 1), checksums=True)["files"]
        held = sum(4 * tensor.numel() for tensor in first[0][0].values())
        # Each piece once: replicas would double it, what is more are the headers of so many small tensors.
        assert held < sum(entry["bytes"] for entry in files.values()) < 1.5 * held
    assert any(tensor.any() for name, tensor in first[0][0].items() if name.startswith("exp_avg_sq/"))


def test_the_weights_can_be_read_without_the_moments(tmp_path: Path):
    _save(tmp_path, 1, {"weight/a.b": torch.ones(2), "exp_avg/a.b": torch.zeros(2), "exp_avg_sq/a.b": torch.zeros(2)})
    weights = read_tensors(checkpoint_folder(tmp_path, 1), "weight/")
    small_runs.assert_same_tensors(weights, {"weight/a.b": torch.ones(2)})


def test_tensors_and_record_come_back(tmp_path: Path):
    tensors = {**_state(1.0), "exp_avg/b": torch.tensor([1e-30, -0.0, float("inf")])}
    _save(tmp_path, 7, tensors)
    folder = checkpoint_folder(tmp_path, 7)
    assert folder == latest_checkpoint(tmp_path)
    assert folder.name == "step-00000007"
    small_runs.assert_same_tensors(read_tensors(folder), tensors)
    record = read_manifest(folder)
    assert {key: record[key] for key in ("step", *RECORD)} == {"step": 7, **RECORD}
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}, "no pickle"


def test_a_partial_checkpoint_is_replaced(tmp_path: Path):
    partial = tmp_path / "checkpoints" / ".step-00000002.partial"
    partial.mkdir(parents=True)
    (partial / "junk").write_text("half")
    _save(tmp_path, 2, _state())
    assert not partial.exists()
    assert sorted(file.name for file in checkpoint_folder(tmp_path, 2).iterdir()) == ["checkpoint.json", "state"]


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"weight/a": torch.zeros(1000, 3)}, "exp_avg/a"),
        ({**_state(), "weight/b": torch.zeros(1)}, "weight/b"),
        ({**_state(), "weight/a": torch.zeros(1000, 4)}, "weight/a"),
    ],
    ids=["fewer", "more", "other-shape"],
)
def test_another_set_of_tensors_is_refused(tmp_path: Path, wanted: dict[str, Tensor], named: str):
    _save(tmp_path, 1, _state())
    folder = checkpoint_folder(tmp_path, 1)
    message = f"{folder}: holds another set of trained tensors, e.g. {named}; was `tune` changed?"
    assert message_of(ValueError, load_checkpoint, folder, wanted) == message


# ---- while training continues


def test_a_save_holds_the_state_at_its_start(tmp_path: Path):
    tensors = _state(1.0)
    with CheckpointWriter(tmp_path, small_runs.ALONE, KEEP) as writer:
        gate = faults.hold_writes(writer)
        writer.start(5, lambda: tensors, RECORD)
        for tensor in tensors.values():
            tensor.fill_(7.0)  # the next step
        gate.set()
        writer.wait()
    small_runs.assert_same_tensors(read_tensors(checkpoint_folder(tmp_path, 5)), _state(1.0))


def test_a_checkpoint_appears_when_it_is_complete(tmp_path: Path):
    with CheckpointWriter(tmp_path, small_runs.ALONE, KEEP) as writer:
        gate = faults.hold_writes(writer)
        writer.start(5, _state, RECORD)  # does not wait for the thread
        assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [".step-00000005.partial"]
        assert latest_checkpoint(tmp_path) is None
        gate.set()
        writer.wait()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_save_waits_for_the_one_before(tmp_path: Path):
    with CheckpointWriter(tmp_path, small_runs.ALONE, KEEP) as writer:
        gate = faults.hold_writes(writer)
        writer.start(1, lambda: _state(1.0), RECORD)
        threading.Timer(0.5, gate.set).start()
        writer.start(2, lambda: _state(2.0), RECORD)
        assert gate.is_set()
        assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)  # leaving the block let it end


# ---- when the disk refuses


def _in_child(work: Callable[[], str]) -> str:
    """What work returns in a forked process, where limits and rights can be given up for good."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    assert small_runs.in_child(lambda: sender.send(work())) == 0
    return receiver.recv()


def _failing_save(run: Path, refuse: Callable[[], None]) -> str:
    def work() -> str:
        with CheckpointWriter(run, small_runs.ALONE, KEEP) as writer:
            writer.start(1, lambda: _state(1.0), RECORD)
            writer.wait()
            refuse()
            with pytest.raises(RuntimeError) as fault:  # noqa: PT012
                writer.start(2, lambda: _state(2.0), RECORD)
                while not writer.failed():
                    pass
                writer.wait()
            return str(fault.value)

    return _in_child(work)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path):
    """A limit on the size of files simulates a full disk: a write ends in an OSError in the middle of a file."""
    message = _failing_save(tmp_path, lambda: faults.fill_disk(5000))
    last, folder = checkpoint_folder(tmp_path, 1), checkpoint_folder(tmp_path, 2)
    assert message.startswith(f"{folder}: could not be saved (")
    assert "File too large" in message
    assert message.endswith(f"); make room, then the run continues from {last}, which is complete")
    assert [found.name for found in (tmp_path / "checkpoints").iterdir()] == [last.name]
    read_manifest(last, checksums=True)
    small_runs.assert_same_tensors(read_tensors(last), _state(1.0))


def _give_up_rights(folder: Path) -> None:
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write anywhere


def test_a_folder_without_rights_is_reported(tmp_path: Path):
    for parent in (tmp_path, *tmp_path.parents):
        if parent.is_relative_to(gettempdir()) and parent != Path(gettempdir()):
            parent.chmod(0o755)
    run = tmp_path / "run"
    message = _failing_save(run, lambda: _give_up_rights(run / "checkpoints"))
    (run / "checkpoints").chmod(0o755)
    assert message.startswith(f"{checkpoint_folder(run, 2)}: could not be saved ([Errno 13] Permission denied")
    read_manifest(checkpoint_folder(run, 1), checksums=True)


def test_a_first_save_that_fails_says_so(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with CheckpointWriter(tmp_path, small_runs.ALONE, KEEP) as writer:
        message = message_of(RuntimeError, writer.start, 1, _state, RECORD)
    assert message.startswith(f"{checkpoint_folder(tmp_path, 1)}: could not be saved ([Errno ")
    assert message.endswith("; make room, then the run starts again, it has no checkpoint")


def test_an_old_checkpoint_that_stays_does_not_end_the_run(tmp_path: Path):
    messages: list[str] = []
    faults.refuse_removal(lambda: step == 2)
    with CheckpointWriter(tmp_path, small_runs.ALONE, KeepPolicy(1), report=messages.append) as writer:
        for step in (1, 2, 3):
            writer.start(step, _state, RECORD)
            writer.wait()
    assert len(messages) == 1
    assert messages[0].startswith("an older checkpoint could not be removed ([Errno 13] Permission denied: ")
    assert messages[0].endswith("); it is tried again after the next save")
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_failed_write_is_noted_on_another_error(tmp_path: Path):
    (run := tmp_path / "run").mkdir()
    with pytest.raises(KeyError) as caught, CheckpointWriter(run, small_runs.ALONE, KEEP) as writer:  # noqa: PT012
        faults.refuse_writes(writer)
        writer.start(1, _state, RECORD)
        raise KeyError("elsewhere")
    assert caught.value.__notes__ == ["[Errno 28] No space left on device"]


def test_saving_keeps_warning_filters_of_other_threads(tmp_path: Path):
    class Mine(UserWarning):
        pass

    with warnings.catch_warnings(), CheckpointWriter(tmp_path, small_runs.ALONE, KEEP) as writer:
        warnings.simplefilter("default")
        gate, started = threading.Event(), threading.Event()
        faults.before_checksums(lambda *_: (started.set(), gate.wait(600)))
        writer.start(1, _state, RECORD)
        assert started.wait(600)
        warnings.simplefilter("error", Mine)  # while the other thread is within its save
        gate.set()
        writer.wait()
        with pytest.raises(Mine):
            warnings.warn("heard", Mine, stacklevel=1)


def _rows(ranks: Ranks) -> dict[str, Tensor]:
    """Sharded tensors, of which each rank holds and writes half."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    return {name: shard_rows(tensor, mesh) for name, tensor in _state().items()}


def _each_its_own(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    seen = faults.note_checkpoint_files()
    with CheckpointWriter(folder, ranks, KEEP) as writer:
        writer.start(1, lambda: _rows(ranks), RECORD)
        writer.wait()
    return seen


def test_each_rank_checksums_and_flushes_its_own_files(tmp_path: Path):
    first, second = run_ranks(_each_its_own, 2, tmp_path)
    names = sorted(read_manifest(checkpoint_folder(tmp_path, 1), checksums=True)["files"])
    assert [f"state/{name}" for name in first["summed"] + second["summed"]] == names
    assert len(names) == 2
    aside = ".step-00000001.partial"
    assert first["flushed"] == [first["summed"][0], ".checkpoint.json.tmp", "state", aside, "checkpoints"]
    assert second["flushed"] == second["summed"]
    small_runs.assert_same_tensors(read_tensors(checkpoint_folder(tmp_path, 1)), _state())


def _refused_after_the_start(rank: int, world_size: int, folder: Path, victim: int, place: str) -> list[Any]:
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    with CheckpointWriter(folder, ranks, KEEP) as writer:
        tensors = _state() if place == "whole" else _rows(ranks)
        if rank == victim and place == "rename":
            faults.refuse_rename()
        elif rank == victim and place == "folder":
            faults.refuse_folders()
        elif rank == victim:
            faults.fill_disk(5000)
        writer.start(1, lambda: tensors, RECORD)
        return [message_of(RuntimeError, writer.wait), writer.failed()]


@pytest.mark.parametrize(
    ("victim", "place"), [(0, "whole"), (0, "pieces"), (1, "pieces"), (0, "rename"), (1, "folder")]
)
def test_a_failed_write_is_raised_on_all_ranks(tmp_path: Path, victim: int, place: str):
    """Shards, the folder for them, or, on rank 0 alone, full tensors or what comes after all shards."""
    first, second = run_ranks(_refused_after_the_start, 2, tmp_path, victim, place)
    assert first == second
    assert first[0].startswith(f"{checkpoint_folder(tmp_path, 1)}: could not be saved (")
    assert not any((tmp_path / "checkpoints").iterdir())


def _one_writes_late(rank: int, world_size: int, folder: Path) -> None:
    ranks, gave_up = Ranks(rank, world_size, rank, torch.device("cpu")), folder / "gave-up"
    with CheckpointWriter(folder, ranks, KEEP, timeout_seconds=2.0) as writer:
        rows = _rows(ranks)
        gate = faults.hold_writes(writer) if rank == 1 else threading.Event()
        writer.start(1, lambda: rows, RECORD)
        while rank == 0 and not writer.failed():
            time.sleep(0.02)
        if rank == 0:
            gave_up.touch()
        while not gave_up.exists():
            time.sleep(0.02)
        gate.set()
        with pytest.raises(RuntimeError):
            writer.wait()


def test_a_rank_that_writes_too_late_ends_the_save(tmp_path: Path):
    run_ranks(_one_writes_late, 2, tmp_path)


def _refused_on_ranks(rank: int, world_size: int, run: Path) -> str:
    with CheckpointWriter(run, Ranks(rank, world_size, rank, torch.device("cpu")), KEEP) as writer:
        return message_of(RuntimeError, writer.start, 1, _state, RECORD)


def test_a_failed_folder_is_raised_on_all_ranks(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    messages = run_ranks(_refused_on_ranks, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "could not be saved" in messages[0]
