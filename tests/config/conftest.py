"""The smallest recipe, for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import pytest

from qwen3vl_train.config import Recipe, recipe_from_dict


@pytest.fixture
def small() -> Callable[..., Recipe]:
    """Return a function: sections that join or replace those of the smallest recipe -> Recipe."""
    required: dict[str, Any] = {
        "name": "small",
        "model": {"path": "some/model"},
        "tune": {"method": "lora"},
        "data": {"train": [{"path": "a.jsonl"}]},
    }
    return lambda **sections: recipe_from_dict({**required, **sections})
