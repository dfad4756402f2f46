"""Arithmetic of the comparison: shares, ratios, targets, and which points are too slow."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import comparison
import pytest
from comparison import TARGETS, Target, peak_share, read_share, target_for, verdicts
from peer import find
from peers import Pace, parse_arguments, series
from tables import rows

from tests.bench.receipts import peer_point


def test_shares() -> None:
    point = peer_point("ours", [2.0, 4.0, 2.0], 1.0)
    point["read_bandwidths"] = [25.0, 12.5, 40.0]
    # 20 of 25, 10 of 12.5, 20 of 40 GB/s
    assert read_share(point) == pytest.approx(0.8)
    # 10^8 in 2 ms is 50 * 10^9 a second
    assert peak_share(point) == pytest.approx(0.5)


def test_one_row_per_point_with_ratios() -> None:
    points = [
        peer_point("ours", [2.0], 1.0),
        peer_point("ggml", [5.0], 2.5),
        peer_point("kt-kernel", [4.0], None),
        peer_point("ggml", [9.0], None, tokens=4),
    ]
    header, texts = rows(comparison.COLUMNS, comparison.side_by_side(points))
    one, four = (dict(zip(header, row, strict=True)) for row in texts)
    assert (one["tokens"], four["tokens"]) == ("1", "4")
    assert one["ggml, ms"] == "5.00 (2.50 x)" and one["kt-kernel, ms"] == "4.00"
    assert one["torch, ms"] == "" and one["GB/s"] == "20.0"
    assert four["ours, ms"] == "" and four["ggml, ms"] == "9.00"


def test_target_parts() -> None:
    target = Target("MXFP4", "A", 1, read=0.85, peak=0.5, faster={"ggml": 1.6, "torch": 2.0})
    met = {text.split()[0]: ok for text, ok in target.verdicts(0.86, 0.49, {"ggml": 1.6})}
    assert met == {"read": True, "peak": False, "ggml": True}


def test_targets_are_judged_with_the_most_threads() -> None:
    points = [
        peer_point("ours", [2.0], 1.0, threads=1),
        peer_point("ours", [1.0], 1.0, threads=2),
        peer_point("ggml", [2.0], 2.0, threads=2),
        peer_point("ours", [1.0], 1.0, threads=2, tokens=3),
    ]
    parts = verdicts(points)
    assert [(p["layer"], p["tokens"], p["met"]) for p in parts] == [("MXFP4 A", 1, True)] * 2
    assert "160 %" in parts[0]["measured"]


def test_each_point_has_one_target() -> None:
    keys = [(t.method, t.shape, t.tokens) for t in TARGETS]
    assert len(set(keys)) == len(keys)
    assert all(target_for(*key) is target for key, target in zip(keys, TARGETS, strict=True))
    assert target_for("MXFP4", "A", 5) is None


def test_series_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--targets"])
    wanted = series(parse_arguments())
    assert wanted["MXFP4", "A"] == [1, 4, 16, 64, 1024] and wanted["BF16", "A"] == [1, 1024]
    assert sum(map(len, wanted.values())) == len(TARGETS)


def test_series_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--methods", "MXFP4,BF16", "--shapes", "B", "--tokens", "2,8"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *options])
    assert series(parse_arguments()) == {("MXFP4", "B"): [2, 8], ("BF16", "B"): [2, 8]}


def test_pace_skips_what_will_be_too_slow() -> None:
    pace = Pace(longest_call=3.0)
    assert pace.expects("x", 6)
    assert pace.saw("x", 6, 1.0)
    assert pace.expects("x", 12) and not pace.expects("x", 24)
    assert not pace.saw("x", 12, 3.5)
    assert not pace.expects("x", 12) and pace.expects("y", 64)


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KT_PYTHON", "GGML_LIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(find, "INSTALLED", tmp_path)
    monkeypatch.setattr(find, "is_installed", lambda distribution: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def test_peers_that_are_nowhere(nothing_installed: Path) -> None:
    assert find.find_ggml(None) is None and find.find_kt(None, None) is None


def test_peers_of_the_build_folder(nothing_installed: Path) -> None:
    libraries = nothing_installed / "ggml" / "build" / "bin"
    libraries.mkdir(parents=True)
    (nothing_installed / "kt_kernel").mkdir()
    ggml, kt = find.find_ggml(None), find.find_kt(None, None)
    assert ggml is not None and kt is not None
    assert ggml.variables == {"GGML_LIB": str(libraries)}
    assert kt.variables == {"PYTHONPATH": str(nothing_installed / "kt_kernel")}
    assert ggml.python == kt.python == sys.executable


def test_an_installed_ggml(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python's own libraries, before those of the build folder."""
    (nothing_installed / "ggml" / "build" / "bin").mkdir(parents=True)
    package = nothing_installed / "site" / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    spec = ModuleSpec("llama_cpp", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    ggml = find.find_ggml(None)
    assert ggml is not None and ggml.variables == {"GGML_LIB": str(package / "lib")}


def test_peers_where_the_user_says(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find.find_ggml("/g") == find.Place(sys.executable, {"GGML_LIB": "/g"})
    assert find.find_kt("/v/python", None) == find.Place("/v/python", {})
    monkeypatch.setenv("KT_PYTHON", "/w/python")
    assert find.find_kt(None, None) == find.Place("/w/python", {})
