"""Counts at SGLang's /metrics. No SGLang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from hybrid_moe.cpu_kernels.use_counts import LayerUse
from hybrid_moe.integrations.sglang import server_metrics
from hybrid_moe.integrations.sglang.server_metrics import FOLDER, ServerMetrics
from hybrid_moe.runtime.metrics import Metrics


class Client:
    """What is used of prometheus_client."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str | None]] = Counter()
        self.made: list[str] = []
        outer = self

        class Counter_:  # noqa: N801
            def __init__(self, name: str, help: str, labels: tuple[str, ...]) -> None:
                assert help and not name.endswith("_total")
                outer.made.append(name)
                self._name, self._labels, self._value = name, labels, None

            def labels(self, value: str) -> Any:
                assert self._labels == ("layer",)
                child = object.__new__(Counter_)
                child._name, child._labels, child._value = self._name, (), value
                return child

            def inc(self, amount: float) -> None:
                assert amount > 0 and not self._labels
                outer.counts[self._name, self._value] += amount  # type: ignore[assignment]

        self.Counter = Counter_


def test_counters_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Metrics({"a": LayerUse(1, 2, 3, 4, 5, 10**9)}, *[0] * 8)
    dip = replace(first, layers={})  # a layer is closing
    later = replace(first, layers={"a": LayerUse(2, 2, 3, 9, 5, 10**9)}, moved_bytes=7)
    states: Iterator[Metrics] = iter([first, dip, later, later])
    monkeypatch.setattr(server_metrics, "metrics", lambda: next(states))
    client = Client()
    ours = ServerMetrics(client)
    for _ in range(4):
        ours.update()
    assert client.counts["hybrid_moe_jobs", "a"] == 2
    assert client.counts["hybrid_moe_cold_pairs", "a"] == 9
    assert client.counts["hybrid_moe_busy_seconds", "a"] == 1.0
    assert client.counts["hybrid_moe_moved_bytes", None] == 7
    assert len(client.made) == len(set(client.made))


def test_only_where_sglang_has_metrics() -> None:
    assert server_metrics.start({}) is None


def test_with_the_real_client(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("prometheus_client")
    made = Metrics({"a": LayerUse(1, 2, 3, 4, 5, 10**9)}, *[0] * 8)
    monkeypatch.setattr(server_metrics, "metrics", lambda: made)
    registry = client.CollectorRegistry()

    class Module:
        @staticmethod
        def Counter(*args: Any) -> Any:  # noqa: N802
            return client.Counter(*args, registry=registry)

    ServerMetrics(Module).update()
    text = client.generate_latest(registry).decode()
    assert 'hybrid_moe_cold_pairs_total{layer="a"} 4.0' in text
    assert FOLDER == "PROMETHEUS_MULTIPROC_DIR"
