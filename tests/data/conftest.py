"""What many tests of data read."""

import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator


@pytest.fixture(scope="session")
def collate(tiny_folder) -> MultimodalCollator:
    """The collator of the untrained checkpoint."""
    return MultimodalCollator.from_pretrained(tiny_folder)
