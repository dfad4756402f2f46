"""What holds after every test of the kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cpu_kernels.amx import emulator


@pytest.fixture(autouse=True)
def no_errors_of_emulated_instructions() -> Iterator[None]:
    """Emulated AMX did nothing that a processor would refuse, and no thread kept its tiles."""
    yield
    errors = emulator().errors[:]
    emulator().errors.clear()
    assert not errors
    patience = time.monotonic() + 30  # a job is complete before its last thread has left it
    while emulator().configured and time.monotonic() < patience:
        time.sleep(0.001)
    assert not emulator().configured
