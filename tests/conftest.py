"""Settings of every test: hypothesis without deadlines, no settings of the caller's shell."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests are small; torch's threads only wait

settings.register_profile(
    "project",
    deadline=None,  # nothing asserts a time
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("project"), max_examples=2500)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier or a dump that the developer's shell asks for must not reach the tests."""
    for name in ("HYBRID_MOE_ISA", "HYBRID_MOE_DUMP"):
        monkeypatch.delenv(name, raising=False)
