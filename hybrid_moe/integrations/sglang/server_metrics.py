"""This package's counts at SGLang's own `/metrics`.

With `--enable-metrics` SGLang's processes write their figures into files of one folder, from which
its server answers (prometheus_client's multiprocess mode; the folder is in the environment). A
scheduler's process puts ours there too, every few seconds. Ranks are summed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from hybrid_moe.runtime.metrics import PREFIX, metrics

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that SGLang sets for its processes where metrics are enabled."""

SECONDS = 5.0
"""Between updates."""


class ServerMetrics:
    """Counters of prometheus_client that follow `metrics()`.

    Args:
        client: the module `prometheus_client`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._counters: dict[str, Any] = {}
        self._told: dict[tuple[str, str | None], float] = {}

    def update(self) -> None:
        """Bring them up to date."""
        for name, what, label, value in metrics().samples():
            counter = self._counters.get(name)
            if counter is None:
                labels = () if label is None else (label[0],)
                # which adds the _total itself
                stem = f"{PREFIX}{name}".removesuffix("_total")
                counter = self._counters[name] = self._client.Counter(stem, what, labels)
            key = name, None if label is None else label[1]
            grown = value - self._told.get(key, 0.0)
            if grown > 0:  # a count that a closing layer takes along for a moment comes back
                self._told[key] = value
                (counter if label is None else counter.labels(label[1])).inc(grown)


def start(environ: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """Begin to update them in this process; None where SGLang has no metrics enabled."""
    if not environ.get(FOLDER):
        return None
    import prometheus_client

    ours = ServerMetrics(prometheus_client)

    def follow() -> None:
        pause = threading.Event()
        while True:
            ours.update()
            pause.wait(SECONDS)

    thread = threading.Thread(target=follow, daemon=True, name="hybrid_moe metrics")
    thread.start()
    return thread
