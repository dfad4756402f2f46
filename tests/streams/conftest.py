"""What tests of streams share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.streams.model import layers


@pytest.fixture
def clean() -> Iterator[None]:
    """Jobs and reports that a test has left are gone before the next one."""
    yield
    group, made = layers()
    while group.work():
        pass
    for layer in made:
        layer.report()
