"""Two trees in turn: the arithmetic of a gain, and a whole run of this tree against itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import harness
import paired
import pytest
from harness import layer_point
from problem import SHAPES, random_batches

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_gain_is_the_median_round() -> None:
    rounds = paired.Rounds(([2.0, 2.0], [1.0, 1.0]), [1.0, 2.0, 9.0], [(20.0, 30.0)], [0.0])
    p = paired.point("MXFP4", SHAPES["small"], 2, 4, rounds, 1e9)
    assert (p["gain"], p["before_ms"], p["ms"]) == (2.0, 2000.0, 1000.0)


def test_four_times_the_rounds_halve_the_error() -> None:
    gains = [1.0, 1.1, 1.2, 1.3, 1.4]
    assert paired.standard_error([2.0] * 7) == 0.0
    expected = 2 * paired.standard_error(gains * 4)
    assert paired.standard_error(gains) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("threads", "all_read", "quiet"), [(2, 25.0, False), (2, 26.0, True), (1, 20.0, None)]
)
def test_who_is_on_the_memory(threads: int, all_read: float, quiet: bool | None) -> None:
    batches = random_batches(SHAPES["small"], 1, 1, seed=1)
    p = layer_point("MXFP4", SHAPES["small"], batches, threads, 1.0, (20.0, all_read), 1e9)
    assert p["quiet"] is quiet


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
    monkeypatch.setattr(harness, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(harness, "ReadProbe", lambda config: ReadProbe(config, nbytes=8 << 20))
    out = tmp_path / "paired.json"
    options = ["--methods", "MXFP4", "--shapes", "small", "--tokens", "1,3", "--threads", "1"]
    more = ["--pairs", "1", "--seconds", "0", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["paired.py", ".", ".", *options, *more])
    paired.main()
    points = json.loads(out.read_text())["points"]
    assert [p["tokens"] for p in points] == [1, 3]
    assert all(p["libraries"] == "hybrid_moe (portable) -> hybrid_moe (portable)" for p in points)
    assert all(len(p["gains"]) == 2 and min(p["gains"]) > 0 for p in points)
