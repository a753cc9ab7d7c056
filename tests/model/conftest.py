"""Both sides of a comparison: our model and collator, and the stock model, read from the same folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3vl_train import MultimodalCollator, Qwen3VLForConditionalGeneration, load_qwen3_vl_model
from tests.helpers import oracles


@pytest.fixture
def ours(oracle_folder: Path) -> Qwen3VLForConditionalGeneration:
    """Our model of each released shape, fresh for every test: change it as you like."""
    return load_qwen3_vl_model(oracle_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def stock(oracle_folder: Path) -> Any:
    """The stock model of the same folder. Read only, but for gradients."""
    return oracles.oracle(oracle_folder)


@pytest.fixture(scope="session")
def collate(oracle_folder: Path) -> MultimodalCollator:
    return MultimodalCollator.from_pretrained(oracle_folder)


@pytest.fixture
def small(tiny_folder: Path) -> Qwen3VLForConditionalGeneration:
    """Four vision blocks and four decoder layers: enough where only our own code is compared with itself."""
    return load_qwen3_vl_model(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def small_collate(tiny_folder: Path) -> MultimodalCollator:
    return MultimodalCollator.from_pretrained(tiny_folder)
