"""The data set of `finding_rows`, and what the inspection says of it."""

import pytest

from qwen3vl_train.inspect.gather import inspect_recipe
from tests.helpers.finding_rows import hazards_recipe, write_hazards


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return write_hazards(tmp_path_factory.mktemp("hazards"))


@pytest.fixture(scope="session")
def recipe(tiny_folder, data_folder):
    return hazards_recipe(tiny_folder, data_folder)


@pytest.fixture(scope="session")
def inspection(recipe):
    """All rows are shown as samples. Read only."""
    return inspect_recipe(recipe, num_samples=50)


@pytest.fixture(scope="session")
def training(inspection):
    """The facts of train.jsonl."""
    return inspection.facts.sources[0]
