"""Two trees in turn: the arithmetic of a gain, and a whole run of this tree against itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import paired
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def point(gains: list[float], **changes: object) -> paired.Point:
    facts = {
        "method": "MXFP4", "shape": "A", "tiers": ("a", "b"), "threads": 2, "tokens": 1,
        "before_ms": 2.0, "after_ms": 1.0, "weight_bandwidth": 20.0, "one_reads": 20.0,
        "all_read": 30.0, "rate": 50.0, "peak": 100.0, "others": 0.0,
    }  # fmt: skip
    return paired.Point(**{**facts, "gains": gains, **changes})  # type: ignore[arg-type]


def test_gain_is_the_median_round() -> None:
    assert point([1.0, 2.0, 9.0]).gain == 2.0
    assert point([2.0] * 7).error == 0.0
    narrow, wide = point([1.0, 1.1, 1.2, 1.3]), point([1.0, 1.1, 1.2, 1.3] * 4)
    assert narrow.error == pytest.approx(2 * wide.error), "four times the rounds, half the error"


@pytest.mark.parametrize(
    ("threads", "all_read", "quiet"), [(2, 25.0, False), (2, 26.0, True), (1, 20.0, True)]
)
def test_who_is_on_the_memory(threads: int, all_read: float, quiet: bool) -> None:
    assert point([1.0], threads=threads, all_read=all_read).quiet is quiet


def test_a_tree_without_an_environment(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make install"):
        paired.place(tmp_path, None)


def test_a_tree_that_runs_another_ones_package(tmp_path: Path) -> None:
    """Its environment has this tree installed: its own files would never run."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "bench").symlink_to(BENCH)
    with pytest.raises(SystemExit, match="which is not of"):
        paired.place(tmp_path, None)


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    this = paired.Place(sys.executable, {"HYBRID_MOE_ISA": "portable"})
    monkeypatch.setattr(paired, "place", lambda tree, tier: this)
    monkeypatch.setattr(paired, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(paired, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(paired, "READ_SECONDS", 0.0)
    out = tmp_path / "paired.json"
    options = ["--methods", "MXFP4", "--shapes", "small", "--tokens", "1,3", "--threads", "1"]
    monkeypatch.setattr(
        "sys.argv", ["paired.py", ".", ".", *options, "--seconds", "0", "--json", str(out)]
    )
    paired.main()
    points = json.loads(out.read_text())["points"]
    assert [p["tokens"] for p in points] == [1, 3]
    assert all(p["tiers"] == ["hybrid_moe (portable)"] * 2 for p in points)
    assert all(len(p["gains"]) == 2 and min(p["gains"]) > 0 for p in points)
