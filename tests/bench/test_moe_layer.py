"""One layer's points: which attempt counts, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import moe_layer
import pytest
from problem import Calls

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe


class Memory:
    """Reads 10, 20, 30, ... GB/s with one thread, twice that with all."""

    def __init__(self) -> None:
        self.speed = 0.0

    def measure(self) -> tuple[float, float]:
        self.speed += 10
        return self.speed, 2 * self.speed


@pytest.mark.parametrize(
    ("others", "chosen", "reads"),
    [
        ([0.0, 0.0], 0, (15.0, 30.0)),  # nobody was busy: no second attempt
        ([0.9, 0.01, 0.0], 1, (35.0, 70.0)),
        ([0.9, 0.2, 0.3, 0.0], 1, (35.0, 70.0)),  # three attempts at most
    ],
)
def test_the_least_disturbed_attempt(
    others: list[float], chosen: int, reads: tuple[float, float]
) -> None:
    attempts = [Calls([float(i)], share) for i, share in enumerate(others)]
    remaining = iter(attempts)
    timing = harness.time_beside_reads(lambda: next(remaining), Memory())  # type: ignore[arg-type]
    assert timing.calls is attempts[chosen]
    assert timing.reads == reads, "the mean of just before and just after"


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(harness, "ReadProbe", lambda config: ReadProbe(config, nbytes=8 << 20))
    monkeypatch.setattr(moe_layer, "mac_ceiling", lambda method, pool, tier: 1e12)
    out = tmp_path / "layer.json"
    options = ["--methods", "MXFP4,BF16", "--shapes", "small", "--tokens", "1,3", "--threads", "1"]
    tier = ["--tiers", "portable,amx", "--seconds", "0", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["moe_layer.py", *options, *tier])
    moe_layer.main()
    document = json.loads(out.read_text())
    keys = [(p["method"], p["tokens"]) for p in document["points"]]
    assert keys[:4] == [("MXFP4", 1), ("MXFP4", 3), ("BF16", 1), ("BF16", 3)]
    for p in document["points"]:
        # tokens x top-4 x 3 matrices of 1024 x 512
        macs = p["tokens"] * 4 * 3 * 1024 * 512
        assert p["rate"] == pytest.approx(macs / p["ms"] / 1e6) and p["rate_ceiling"] == 1000
        assert p["quiet"] is None and p["read_bandwidth"] == p["one_thread_reads"] > 0
    one = document["points"][0]
    # 4 of 8 experts at 4.25 bits a weight, whichever they are
    assert one["weight_bandwidth"] == pytest.approx(4 * 3 * 1024 * 512 * 4.25 / 8 / one["ms"] / 1e6)
