"""Arithmetic of the comparison: shares, ratios, targets, and which points are too slow."""

from __future__ import annotations

import platform
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import comparison
import numpy as np
import pytest
from comparison import TARGETS, Target, decode_share, peak_share, read_share, target_for, verdicts
from decode.counted import counted_rate
from peer import find
from peers import Pace, parse_arguments, series
from tables import rows
from weights import format_of, random_planes

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import Matrix, check_matrix
from hybrid_moe.formats.weight_format import WeightFormat
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


def test_bars_of_avx2_are_ratios() -> None:
    target = target_for("Q4_K", "A", 1, narrow=True)
    assert target is not None
    met = dict(target.verdicts(0.1, 0.1, {"ggml": 1.01, "kt-kernel": 1.29}, decode=0.1))
    assert sorted(met.values()) == [False, True] and target_for("Q4_K", "A", 1024, True) is None


def test_series_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--targets"])
    wanted = series(parse_arguments())
    assert wanted["MXFP4", "A"] == [1, 4, 16, 64, 1024] and wanted["BF16", "A"] == [1, 1024]
    assert sum(map(len, wanted.values())) == len(TARGETS)


def test_every_format_is_in_the_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one token and at 1024; those with weights of an own kind are known to weights.py."""
    monkeypatch.setattr(sys, "argv", ["peers.py", "--formats"])
    args = parse_arguments()
    assert args.rounds >= 5
    wanted = series(args)
    formats = {format_of(method.split("+")[0]) for method, _ in wanted}
    families = {fmt.scaling.split(",")[0] for fmt in FORMATS.values()} | {"fp16, min"}
    assert {f.scaling for f in formats} | {f.scaling.split(",")[0] for f in formats} >= families
    assert wanted["Q4_K", "A"] == [1, 1024]
    assert wanted["AMXINT4", "A"] == [1] and wanted["AMXINT4+int8", "A"] == [1024]
    monkeypatch.setattr(sys, "argv", ["peers.py", "--formats", "--methods", "FP8,AMXINT8"])
    assert {m for m, _ in series(parse_arguments())} == {"FP8", "AMXINT8", "AMXINT8+int8"}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_random_weights_are_valid_and_of_one_size(fmt: WeightFormat) -> None:
    codes = random_planes(fmt, np.random.default_rng(0), 128, 512)
    check_matrix(Matrix(**codes.planes, scale_rows=fmt.scale_rows), fmt, 128, 512)
    values = codes.dequantize()
    assert np.isfinite(values).all() and 1 / 500 < np.abs(values).mean() < 1 / 5
    assert np.array_equal(codes.rows(128).dequantize(), values)


def test_a_decode_share_is_of_the_lower_ceiling() -> None:
    """20 GB/s where 25 could be read."""
    point = peer_point("ours", [2.0], 1.0)
    for counted, share in ((None, None), (0.0, None), (40.0, 0.8), (22.0, 20 / 22)):
        assert decode_share({**point, "counted_rate": counted}) == (
            None if share is None else pytest.approx(share)
        )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its assembly is read")
@pytest.mark.parametrize("name", ["avx2", "avx512_vbmi"])
def test_decode_rates_are_counted_for_every_kind_of_kernel(name: str) -> None:
    """A format of each kind of kernel."""
    tier = TIERS[name]
    for kind in ("MXFP4", "BF16", "FP8", "INT8_ROW_FLOAT32", "INT4_G32_FP16_Z1", "Q6_K"):
        if has_kernels(fmt := FORMATS[kind]):
            counted = counted_rate(fmt, tier, 1e9, 2)
            assert counted is not None, fmt.name
            assert counted == pytest.approx(2 * counted_rate(fmt, tier, 1e9, 1))
            # no core reads and decodes more than three lines of 64 bytes a cycle
            assert 1 < counted < 2 * 3 * 64


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
