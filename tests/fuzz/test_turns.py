"""`make fuzz`: both fuzzers in turn, each input and each episode once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import __main__ as turns
from tests.fuzz import loaders, wrapper
from tests.fuzz.loaders import Report

Spans = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> tuple[Spans, Spans]:
    """(first, number) of the inputs and of the episodes that were run."""
    inputs: Spans = []
    episodes: Spans = []

    def run_loaders(first: int, count: int, seed: int, folder: Path) -> Report:
        inputs.append((first, count))
        failures = [(7, "headers", "why")] if seed == 1 else []
        return Report(Counter(headers=count), Counter(), failures, 1.0, interrupted=seed == 2)

    def run_wrappers(seed: int, calls: int) -> Counter[str]:
        episodes.append((seed, calls))
        return Counter(calls=calls, episodes=3)

    monkeypatch.setattr(loaders, "run", run_loaders)
    monkeypatch.setattr(wrapper, "run", run_wrappers)
    return inputs, episodes


def test_turns_go_on_where_the_last_ended(calls: tuple[Spans, Spans]) -> None:
    assert turns.run(100, inputs=50, calls=20, turns=2)
    assert calls == ([(0, 50), (50, 50)], [(100, 20), (103, 20)])


@pytest.mark.parametrize("seed,right", [(1, False), (2, True)])
def test_a_failure_or_an_interrupt_of_the_loaders_ends_it(
    calls: tuple[Spans, Spans], seed: int, right: bool
) -> None:
    assert turns.run(seed, inputs=50, calls=20) is right
    assert calls == ([(0, 50)], [])
