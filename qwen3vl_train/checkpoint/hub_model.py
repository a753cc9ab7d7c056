"""Find the base checkpoint of a recipe: a local folder, or a name on the Hugging Face Hub, downloaded once."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3vl_train.arch import read_config
from qwen3vl_train.config import Recipe
from qwen3vl_train.config.fields import is_hub_id

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""What a checkpoint is made of; no pickles and no code."""
_HEARTBEAT_SECONDS = 10.0


def with_local_model(recipe: Recipe, heartbeat: Callable[[], None] = lambda: None) -> Recipe:
    """Return the recipe with a local folder as model.path; a name on the Hub then is its model.hub_id.

    A snapshot that is in the Hub's cache already is taken without asking the Hub, so that a run resumes with the
    weights that it was started with. Raises ValueError that says why there is none.

    heartbeat: called every few seconds while a checkpoint is downloaded.
    """
    model = recipe.model
    if os.path.exists(model.path) or not is_hub_id(model.path):
        if model.revision is not None:
            raise ValueError(f"model.revision: {model.revision}, but model.path {model.path} is local; remove it")
        read_config(model.path)  # so that a path that is no checkpoint is named for what it is before all else
        return recipe
    with _beating(heartbeat):
        folder = _snapshot(model.path, model.revision)
    local = {"path": folder, "hub_id": model.hub_id or model.path, "revision": None}
    # A copy, which remembers what the recipe gives and what it leaves to tune.start_from.
    return recipe.model_copy(update={"model": model.model_copy(update=local)})


def _snapshot(name: str, revision: str | None) -> str:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=True)
        if _is_complete(Path(folder)):
            return folder
    except LocalEntryNotFoundError:
        pass
    what = f"model.path: {name} is not a folder here"
    at = f" (revision {revision})" if revision else ""
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{what}, and the cache {constants.HF_HUB_CACHE} does not hold all of it{at} while HF_HUB_OFFLINE is set; "
            f"unset it, or run `hf download {name}` where there is a network and set HF_HUB_CACHE to that cache"
        )
    print(f"{what}: downloading it{at} from the Hugging Face Hub to {constants.HF_HUB_CACHE}", file=sys.stderr)
    try:
        return snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{what}, and cannot be downloaded{at} ({type(error).__name__}: {reason[0] if reason else 'no reason'}); "
            "correct the name, or run `hf auth login` for a model that asks for it"
        ) from None


def _is_complete(folder: Path) -> bool:
    """Return whether a snapshot has its configuration and all of its weights: a download may have been interrupted."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return all((folder / name).is_file() for name in {"config.json", "tokenizer.json", *names})


@contextmanager
def _beating(heartbeat: Callable[[], None]) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_HEARTBEAT_SECONDS):
            heartbeat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
