"""What holds after every test of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu_kernels.amx import emulator


@pytest.fixture(autouse=True)
def no_errors_of_emulated_instructions() -> Iterator[None]:
    """Emulated AMX did nothing that a processor would refuse, and no thread kept its tiles."""
    yield
    errors, configured = emulator().errors[:], emulator().configured
    emulator().errors.clear()
    assert not errors
    assert not configured
