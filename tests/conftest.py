"""Settings of every test: hypothesis without deadlines, --isa, the mark `full`, nothing from the
caller's shell."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--isa", metavar="TIER", help="as on a machine of this tier: tests/isa.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; run by `make test-full` only")
    os.environ.pop("HYBRID_MOE_ISA", None)
    if name := config.getoption("isa"):
        from tests.isa import simulate

        simulate(name)


def _tier(item: pytest.Item) -> Any:
    """Name of the tier that a test is parametrized over; of another thing, or None, elsewhere."""
    if (spec := getattr(item, "callspec", None)) is None:
        return None
    return spec.params.get("name", getattr(spec.params.get("tier"), "name", None))


def _runs_elsewhere(item: pytest.Item) -> bool:
    """Whether another tier has the same kernels for the test's format."""
    if (tier := _tier(item)) is None or "fmt" not in item.callspec.params:  # type: ignore[attr-defined]
        return False
    from tests.isa import repeats

    return repeats(item.callspec.params["fmt"], tier)  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What has the mark `full`, and what another tier's test proves, runs where that is asked for;
    with --isa, what is parametrized over tiers runs for that one."""
    isa = config.getoption("isa")
    if not os.environ.get("HYBRID_MOE_TEST_FULL"):
        for item in items:
            if item.get_closest_marker("full") or (not isa and _runs_elsewhere(item)):
                item.add_marker(pytest.mark.skip(reason="make test-full"))
    if not isa:
        return
    from hybrid_moe.cpu_kernels.dsl.tiers import TIERS

    others = [item for item in items if _tier(item) in TIERS and _tier(item) != isa]
    config.hook.pytest_deselected(items=others)
    dropped = set(others)
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish() -> None:
    """Tests call the garbage collector often, and are about objects that they make: it need not go
    through the modules and the tests each time, a million objects in a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """A tier or a dump that the developer's shell asks for must not reach the tests; the tier of
    --isa, if this processor can run it, is HYBRID_MOE_ISA for the processes that they start."""
    monkeypatch.delenv("HYBRID_MOE_DUMP", raising=False)
    if not pytestconfig.getoption("isa"):
        monkeypatch.delenv("HYBRID_MOE_ISA", raising=False)


@pytest.fixture(autouse=True)
def _reports_of_other_tests() -> None:
    """Reports of failed runs are the process's: what an earlier test has left, or a run of its that
    has ended since, would be the next one's that asks."""
    if (faults := sys.modules.get("hybrid_moe.streams.faults")) is not None:
        with contextlib.suppress(RuntimeError, IndexError):
            faults.check_errors()
