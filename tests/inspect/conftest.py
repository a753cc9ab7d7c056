"""The data set of `finding_rows` and its inspection."""

import pytest

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.inspect.recipe import inspect_recipe
from tests.helpers.finding_rows import finding_rows_recipe, write_finding_rows


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return write_finding_rows(tmp_path_factory.mktemp("findings"))


@pytest.fixture(scope="session")
def recipe(tiny_folder, data_folder):
    return finding_rows_recipe(tiny_folder, data_folder)


@pytest.fixture(scope="session")
def collate(tiny_folder):
    limits = {"max_visual_tokens_per_image": 24, "min_visual_tokens_per_image": 4}
    return MultimodalCollator.from_pretrained(tiny_folder, **limits)


@pytest.fixture(scope="session")
def inspection(recipe):
    """Show all rows as samples. Read only."""
    return inspect_recipe(recipe, num_samples=50)


@pytest.fixture(scope="session")
def training(inspection):
    """The facts of train.jsonl."""
    return inspection.facts.sources[0]
