"""Shared set-up: one thread, no network, and the tiny checkpoints that many tests read.

The root and `data/` are on the import path (`pythonpath` in pyproject.toml): a test says `from tests.helpers import
oracles`, `import digits`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: OpenMP reads its variables once. More threads only fight each other on a small machine, and
# a process that has OpenMP threads must not fork.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")

import pytest
import tiny_checkpoint
import torch
import torch.distributed as dist

from tests.helpers import faults, marks, oracles

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks.add_marks(item)


def pytest_runtest_protocol(item: pytest.Item) -> None:
    marks.watch(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    yield
    marks.check()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the package caches in a folder of its own, never in the user's cache."""
    os.environ["QWEN3VL_TRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _undo_faults() -> Iterator[None]:
    """Restore what a test replaced in our code."""
    yield
    faults.undo()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained checkpoint of the quickstart. Read only: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_checkpoint.write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def make_oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: keywords of `oracles.oracle_checkpoint` -> its folder, built once a session. Read only."""
    made: dict[tuple, Path] = {}

    def make(**options) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = oracles.oracle_checkpoint(tmp_path_factory.mktemp("oracle"), **options)
        return made[key]

    return make


# The two shapes that were released (2B and 4B; 8B and 32B), one in each dialect of config.json.
ORACLES = {
    "24-tied-published": {"vision_depth": 24, "tie": True, "dialect": "published"},
    "27-untied-saved": {"vision_depth": 27, "tie": False, "dialect": "saved"},
}


@pytest.fixture(scope="session", params=list(ORACLES.values()), ids=list(ORACLES))
def oracle_folder(request: pytest.FixtureRequest, make_oracle: Callable[..., Path]) -> Path:
    """A random checkpoint that stock transformers wrote; the test runs once for each of ORACLES."""
    return make_oracle(**request.param)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `small_runs.write_task`. Read only."""
    from tests.helpers import small_runs

    return small_runs.write_task(tmp_path_factory.mktemp("task") / "task")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `engine_runs.write_small_checkpoint`. Read only."""
    from tests.helpers import engine_runs

    return engine_runs.write_small_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def steps(small: Path) -> list:
    """The packs of `engine_runs.make_steps`. Read only."""
    from tests.helpers import engine_runs

    return engine_runs.make_steps(small)


@pytest.fixture(scope="module")
def fast_zero_steps() -> Iterator[None]:
    """Make hundreds of ZeRO steps bearable: import once for all ranks, and do not compare collectives.

    At its import DeepSpeed asks a compiler about each of its operators, and its first engine imports torch's inductor
    for an optimizer that is not used: seconds for every forked rank. And ZeRO sends every small tensor by itself:
    comparing it between the ranks first, as TORCH_DISTRIBUTED_DEBUG=DETAIL does, triples the time in the kernel. A test
    that needs the comparison switches it on.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

        dist.set_debug_level(dist.DebugLevel.OFF)
        yield
        dist.set_debug_level_from_env()
