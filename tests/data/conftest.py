"""Fixtures that many tests of data read."""

import fsspec
import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from tests.helpers import row_files


@pytest.fixture(scope="session")
def collate(tiny_folder) -> MultimodalCollator:
    """The collator of the untrained checkpoint."""
    return MultimodalCollator.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The paths of `row_files.write_all` by type. Read only."""
    return row_files.write_all(tmp_path_factory.mktemp("files"))


@pytest.fixture
def bucket():
    """A file system of fsspec that exists in this process alone: anything at a URL."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True)
