"""The rows that loaders and streams read."""

import shutil

import pytest

from tests.helpers.loaders import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("packing") / "rows")


@pytest.fixture
def copy(folder, tmp_path):
    """Another machine's copy of the folder, to be damaged."""
    shutil.copytree(folder, tmp_path / "rows")
    return tmp_path / "rows"
