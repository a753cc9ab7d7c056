"""The message of an error that a call must raise."""

from collections.abc import Callable
from typing import Any

import pytest


def message_of(error: type[Exception], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Call a function that must raise this error, and return the error's message."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)
