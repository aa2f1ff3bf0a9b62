"""These tests run the kernels on CPU tensors in Triton's interpreter, which must be chosen before triton is imported, so they have a process of their own:
`TRITON_INTERPRET=1 pytest tests/triton/interpret`."""

import os
from collections.abc import Iterator

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton.interpret import bf16, bounds

    bf16.install()
    bounds.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if "tests/triton/interpret" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, as `make test` sets it for this directory"))


@pytest.fixture(autouse=True)
def poison(poisoned_empty: None) -> Iterator[None]:
    """An element that a kernel forgets to write is NaN."""
    yield
