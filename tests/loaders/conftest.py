from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.families import FamilyFixture, write_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyFixture]:
    """`family(name)`: the checkpoint of that name, written once. Do not change its files."""
    return cache(lambda name: write_family(name, tmp_path_factory.mktemp(name)))
