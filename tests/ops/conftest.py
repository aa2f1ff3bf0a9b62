from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def poison(poisoned_empty: None) -> Iterator[None]:
    """Every op test runs over poisoned memory."""
    yield
