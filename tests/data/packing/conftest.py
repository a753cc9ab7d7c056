"""The rows that loaders and streams read."""

import shutil

import pytest

from qwen3vl_train.data.packing.index import build_index
from tests.helpers import loaders


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return loaders.write_folder(tmp_path_factory.mktemp("packing") / "rows")


@pytest.fixture
def copy(folder, tmp_path):
    """Another machine's copy of the folder, to be damaged."""
    shutil.copytree(folder, tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture(scope="session")
def index(folder, collate):
    return build_index(loaders.sources_of(folder), collate, loaders.RULE)


@pytest.fixture(scope="session")
def make(folder, collate, index):
    """A function: kind of producer, and options of `make_loader` -> a loader of the undamaged rows."""
    return lambda kind, *weights, **changes: loaders.make_loader(
        kind, folder, collate, *weights, index=index, **changes
    )


@pytest.fixture(scope="module", params=loaders.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def straight(make, kind):
    """The steps of an undisturbed run on one rank."""
    return list(make(kind))
