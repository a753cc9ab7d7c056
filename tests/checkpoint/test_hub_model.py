"""Base checkpoints by their names on the Hub, from a cache made here: no test uses a network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from qwen3vl_train.checkpoint import hub_model
from qwen3vl_train.checkpoint.hub_model import with_local_model
from qwen3vl_train.config import Recipe, load_recipe
from qwen3vl_train.train.load_run import restore_run
from qwen3vl_train.train.loop import train
from tests.helpers import small_runs
from tests.helpers.messages import message_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds owner/tiny; returns the folder of its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in small.iterdir():
        shutil.copyfile(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


def _recipe(task: Path, out: Path, path: str = "owner/tiny", **model: str) -> Recipe:
    case = {"tune": small_runs.LORA, "train__num_steps": 1, **{f"model__{key}": value for key, value in model.items()}}
    return small_runs.make_recipe(Path(path), task, out, **case)


def test_a_run_from_a_name_on_the_hub(hub: Path, task: Path, tmp_path: Path):
    recipe = _recipe(task, tmp_path / "out")
    run = train(recipe)
    saved = load_recipe(run / "recipe.yaml").model
    assert (saved.path, saved.hub_id, saved.revision) == (str(hub), "owner/tiny", None)
    assert restore_run(run, dtype=None).step == 1
    train(recipe)  # the same recipe finds its run again


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_and_another_name_for_exports(hub: Path, task: Path, tmp_path: Path, revision: str):
    named = _recipe(task, tmp_path, revision=revision, hub_id="me/mine")
    recipe = with_local_model(named)
    local = recipe.model
    assert (local.path, local.hub_id, local.revision) == (str(hub), "me/mine", None)
    assert recipe.tune.model_fields_set == named.tune.model_fields_set, "what tune.start_from may fill in stays open"


def test_local_folders_are_left_as_they_are(small: Path, task: Path, tmp_path: Path):
    recipe = _recipe(task, tmp_path, path=str(small))
    assert with_local_model(recipe) is recipe
    with_revision = _recipe(task, tmp_path, path=str(small), revision="main")
    expected = f"model.revision: main, but model.path {small} is local; remove it"
    assert message_of(ValueError, with_local_model, with_revision) == expected


@pytest.mark.parametrize("case", ["another model", "another revision", "interrupted"])
def test_what_is_not_in_the_cache_is_said_offline(hub: Path, task: Path, tmp_path: Path, case: str):
    path, revision = ("owner/other" if case == "another model" else "owner/tiny"), {}
    if case == "another revision":
        revision = {"revision": "v2"}
    if case == "interrupted":
        (hub / "model.safetensors").unlink()
    message = message_of(ValueError, with_local_model, _recipe(task, tmp_path, path=path, **revision))
    at = " (revision v2)" if revision else ""
    cache = tmp_path / "hub"
    assert message == (
        f"model.path: {path} is not a folder here, and the cache {cache} does not hold all of it{at} while "
        f"HF_HUB_OFFLINE is set; unset it, or run `hf download {path}` where there is a network and set HF_HUB_CACHE "
        "to that cache"
    )


def test_a_failed_download_says_why(hub: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The address is of this machine, and nothing answers there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = message_of(ValueError, with_local_model, _recipe(task, tmp_path, path="owner/other"))
    assert message.startswith("model.path: owner/other is not a folder here, and cannot be downloaded (")
    assert message.endswith("; correct the name, or run `hf auth login` for a model that asks for it")
    assert "downloading it from the Hugging Face Hub to" in capsys.readouterr().err


def test_a_download_sends_heartbeats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_model, "_HEARTBEAT_SECONDS", 0.001)
    heard: list[int] = []
    with hub_model._beating(lambda: heard.append(1)):
        while len(heard) < 2:
            pass
    count = len(heard)
    assert len(heard) == count


def test_a_snapshot_that_is_gone_says_how_to_get_it_again(hub: Path, task: Path, tmp_path: Path):
    run = train(_recipe(task, tmp_path / "out"))
    shutil.rmtree(tmp_path / "hub")
    message = message_of(ValueError, restore_run, run, dtype=None)
    assert f"hf download owner/tiny --revision {COMMIT}" in message
