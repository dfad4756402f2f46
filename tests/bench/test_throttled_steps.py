"""Decided steps on the emulated machine: the planner learns its rates, and does what pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import throttled_steps


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = tmp_path / "steps.json"
    words = f"throttled_steps.py --steps 1 --layers 3 --layer-ms 10 --json {receipt}".split()
    monkeypatch.setattr("sys.argv", words)
    throttled_steps.main()
    points = json.loads(receipt.read_text())["points"]
    assert [p["way"] for p in points] == 2 * list(throttled_steps.WAYS)
    for plain, sent, both in (points[:3], points[3:]):
        k = plain["top_k"]
        assert plain["ideal"] == pytest.approx(3 * 0.01) and plain["sent"] == 0
        # with n of k sent the link takes 2 n and the CPU k - n, where it alone takes k
        best = min(max(2 * n, k - n) for n in range(k)) / k
        assert sent["ideal"] == pytest.approx(3 * 0.01 * (0.3 + 0.7 * best))
        assert both["ideal"] < sent["ideal"] and sent["sent"] > 0
