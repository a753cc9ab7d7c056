"""Which checkpoints are complete, which is chosen, and which are removed."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_train.checkpoint.manifest import (
    KeepPolicy,
    checkpoint_folder,
    checksum_files,
    choose_checkpoint,
    complete_checkpoints,
    latest_checkpoint,
    prune,
    prune_exports,
    read_manifest,
    rename_damaged,
    write_manifest,
)
from tests.helpers import faults, small_runs
from tests.helpers.messages import message_of

REMEDY = "restore one from a copy, or choose another name to start anew"


def _make(run: Path, step: int, **record: Any) -> Path:
    folder = checkpoint_folder(run, step)
    (folder / "state").mkdir(parents=True)
    for shard in (1, 2):
        (folder / "state" / f"shard-{shard}.safetensors").write_bytes(bytes([step, shard]) * 500)
    entries = checksum_files(folder, (folder / "state").iterdir())
    write_manifest(folder, {"step": step, "updates": 0, "loader": {}, "rejects": [], **record}, entries)
    return folder


def _steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in complete_checkpoints(run)]


def test_the_manifest_lists_every_file_with_size_and_checksum(tmp_path):
    folder = _make(tmp_path, 4, world_size=2, engine="fsdp2")
    record = read_manifest(folder, checksums=True)
    assert (record["step"], record["world_size"], record["engine"]) == (4, 2, "fsdp2")
    assert list(record["files"]) == ["state/shard-1.safetensors", "state/shard-2.safetensors"]
    assert record["files"]["state/shard-1.safetensors"] == {"bytes": 1000, "crc32": 3839127308}


def test_checksums_do_not_depend_on_the_block_size(tmp_path):
    folder = _make(tmp_path, 1)
    faults.set_checksum_block(7)
    read_manifest(folder, checksums=True)


def _missing(folder: Path) -> str:
    file = folder / "state" / "shard-2.safetensors"
    file.unlink()
    return f"{file}: missing; restore it, or move this checkpoint away"


def _cut(folder: Path) -> str:
    file = folder / "state" / "shard-1.safetensors"
    os.truncate(file, 999)
    return f"{file}: 999 bytes, written with 1000; restore it, or move this checkpoint away"


def _altered(folder: Path) -> str:
    file = folder / "state" / "shard-1.safetensors"
    content = bytearray(file.read_bytes())
    content[500] ^= 1  # one bit
    file.write_bytes(content)
    return f"{file}: its checksum is not the one it was written with; restore it, or move this checkpoint away"


def _no_loader(folder: Path) -> str:
    file = folder / "checkpoint.json"
    record = json.loads(file.read_text())
    del record["loader"], record["rejects"]
    file.write_text(json.dumps(record))
    return f"{file}: has no loader, rejects; restore it, or move this checkpoint away"


def _unreadable(content: bytes, why: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / "checkpoint.json").write_bytes(content)
        return f"{folder / 'checkpoint.json'}: unreadable ({why}"

    return damage


DAMAGES = {
    "missing": _missing,
    "cut": _cut,
    "altered": _altered,
    "no loader": _no_loader,
    "cut json": _unreadable(b'{"step"', "JSONDecodeError("),
    "list": _unreadable(b"[]", "TypeError("),
    "no files": _unreadable(b'{"step": 1}', "KeyError('files')); restore it, or move this checkpoint away"),
    "not utf-8": _unreadable(b"\xff", "UnicodeDecodeError("),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path, damage):
    _make(tmp_path, 2)
    good = _make(tmp_path, 4)
    message = damage(_make(tmp_path, 6))
    chosen, faults = choose_checkpoint(tmp_path)
    assert chosen == good
    assert [fault.startswith(message) for fault in faults] == [True]
    rename_damaged(tmp_path, chosen)
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000002", "step-00000004"]
    _make(tmp_path, 6)  # its step can be saved again
    assert choose_checkpoint(tmp_path) == (checkpoint_folder(tmp_path, 6), [])


def test_only_the_checksums_show_an_altered_bit(tmp_path):
    folder = _make(tmp_path, 2)
    _altered(folder)
    read_manifest(folder)
    with pytest.raises(ValueError, match="checksum"):
        read_manifest(folder, checksums=True)


def test_an_unreadable_checkpoint_is_skipped(tmp_path):
    good, bad = _make(tmp_path, 2), _make(tmp_path, 4)
    faults.fail_checksums_of(bad)
    file = bad / "state" / "shard-1.safetensors"
    fault = f"{file}: cannot be read (Input/output error); restore it, or move this checkpoint away"
    assert choose_checkpoint(tmp_path) == (good, [fault])


def test_all_reasons_are_given_where_none_is_complete(tmp_path):
    older, newer = _cut(_make(tmp_path, 2)), _missing(_make(tmp_path, 4))
    assert (
        message_of(ValueError, choose_checkpoint, tmp_path)
        == f"{tmp_path}: none of 2 checkpoints can be resumed from\n  - {newer}\n  - {older}\n{REMEDY}"
    )


def test_a_partial_checkpoint_is_not_chosen(tmp_path):
    assert choose_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoints" / ".step-00000002.partial" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    assert choose_checkpoint(tmp_path) == (None, [])
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(_make(tmp_path, 1).parents[1]) == checkpoint_folder(tmp_path, 1)


def test_a_run_that_starts_renames_no_checkpoint(tmp_path):
    _make(tmp_path, 2)
    rename_damaged(tmp_path, None)
    assert _steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepPolicy(1), [7]),
        (KeepPolicy(3), [5, 6, 7]),
        (KeepPolicy(9), [1, 2, 3, 4, 5, 6, 7]),
        (KeepPolicy(1, keep_every=3), [3, 6, 7]),
        (KeepPolicy(1, keep_best="held"), [2, 7]),
        (KeepPolicy(2, keep_every=5, keep_best="held"), [2, 5, 6, 7]),
        (KeepPolicy(1, keep_best="unknown"), [7]),
        (KeepPolicy(1, keep_best="exploded"), [2, 7]),
    ],
    ids=str,
)
def test_prune_keeps_what_the_policy_says(tmp_path, policy, kept):
    losses = {1: 3.0, 2: 1.5, 4: 2.0, 6: 1.6}  # not every checkpoint was evaluated
    for step in range(1, 8):
        exploded = {1: math.nan, 2: 9.0, 3: -math.inf, 4: math.inf, 5: 10.0}.get(step, math.nan)
        _make(tmp_path, step, eval={"held": losses[step], "exploded": exploded} if step in losses else {})
    prune(tmp_path, policy)
    assert _steps(tmp_path) == kept
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in kept]


def test_exports_are_kept_as_checkpoints_are(tmp_path):
    for step, loss in ((2, 2.0), (4, 1.0), (6, 3.0), (8, 3.0)):
        _make(tmp_path, step, eval={"held": loss})
    for step in range(1, 9):
        (tmp_path / "export" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "export" / "mine").mkdir()
    prune_exports(tmp_path, KeepPolicy(2, keep_every=3, keep_best="held"))
    names = sorted(folder.name for folder in (tmp_path / "export").iterdir())
    assert names == ["mine", *(f"step-{step:08d}" for step in (3, 4, 6, 7, 8))]
    prune_exports(tmp_path / "without", KeepPolicy(1))


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        _make(tmp_path, step, eval={"held": loss})
    (checkpoint_folder(tmp_path, 2) / "checkpoint.json").write_text("{")
    prune(tmp_path, KeepPolicy(1, keep_best="held"))
    assert _steps(tmp_path) == [1, 3]


def test_a_removed_folder_of_the_same_step_is_replaced(tmp_path):
    left = _make(tmp_path, 1)
    left.rename(left.with_name(".step-00000001.removed"))
    _make(tmp_path, 1)  # the run was resumed and did it again
    _make(tmp_path, 2)
    prune(tmp_path, KeepPolicy(1))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_kill_while_pruning_leaves_no_partial_checkpoint(tmp_path):
    for step in (1, 2, 3):
        _make(tmp_path, step)

    def work() -> None:
        faults.kill_within_removal()
        prune(tmp_path, KeepPolicy(2))

    assert small_runs.in_child(work) == -9
    assert _steps(tmp_path) == [2, 3]
    _make(tmp_path, 1)  # a run that starts again can save the step
    prune(tmp_path, KeepPolicy(9))
    names = sorted(folder.name[-9:] for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["-00000001", "-00000002", "-00000003"]


def test_a_checkpoint_without_moments_is_not_resumed_from(tmp_path):
    with_moments, without = _make(tmp_path, 1), _make(tmp_path, 2, optimizer=False)
    why = f"{without}: can be exported but not resumed from, checkpoint.keep_optimizer was last"
    assert choose_checkpoint(tmp_path) == (with_moments, [why])
    (with_moments / "checkpoint.json").unlink()
    message = message_of(ValueError, choose_checkpoint, tmp_path)
    assert message == f"{tmp_path}: none of 1 checkpoints can be resumed from\n  - {why}\n{REMEDY}"
