"""Receipts become one stored document, a page and pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import report

from hybrid_moe.planning.receipt import write_receipt
from tests.bench.receipts import every_bench, layer_point, machine, peer_point


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its header."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_join_concatenates_points_and_merges_tables() -> None:
    first = machine("moe_layer", points=[layer_point()], skipped={"amx": "a"}, note="x")
    second = machine("moe_layer", points=[layer_point(tokens=4)], skipped={"avx512": "b"}, note="y")
    document = report.join([first, {**second, "date": "2026-01-03"}])
    bench = document["benches"]["moe_layer"]
    assert [p["tokens"] for p in bench["points"]] == [1, 4]
    assert bench["skipped"] == {"amx": "a", "avx512": "b"} and bench["note"] == "y"
    assert document["date"] == "2026-01-03"
    assert len(first["points"]) == 1, "joining changed a receipt"


def test_join_refuses_two_machines() -> None:
    other = machine("pool", points=[]) | {"processor": "Q"}
    with pytest.raises(SystemExit, match="different processors"):
        report.join([machine("pool", points=[]), other])


def test_store_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    report.store(report.join(every_bench()), tmp_path)
    again = machine("moe_layer", points=[layer_point(ms=1.0)], skipped={})
    path = report.store(report.join([again]), tmp_path)
    assert path.name == "2026-01-02-p-x-2-cores.json" and list(tmp_path.glob("*.json")) == [path]
    benches = json.loads(path.read_text())["benches"]
    assert [p["ms"] for p in benches["moe_layer"]["points"]] == [1.0]
    assert set(benches) == {receipt["bench"] for receipt in every_bench()}


def test_every_benchmark_has_a_section() -> None:
    assert set(report.SECTIONS) == {receipt["bench"] for receipt in every_bench()}


def test_page(tmp_path: Path) -> None:
    report.store(report.join(every_bench()), tmp_path)
    report.render(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "P (x), 2 cores, 2026-01-02" in text
    assert rows_of(text, "### Ceilings")[0] == ["1 thread", "1", "12.5", "11.5"]
    layer = rows_of(text, "### One MoE layer")[0]
    assert layer[5] == "80" and layer[8] == "50", "shares of read bandwidth and of peak"
    whole, peer = rows_of(text, "### Whole models")[:2]
    assert whole[9:11] == ["8.00", "50"] and whole[13:] == ["0.500", "0.90, 1.10"]
    assert peer[6] == "2.00 x" and peer[11] == "1.50 x" and peer[13:] == ["", ""]
    assert rows_of(text, "### Linear layers")[0][6] == "80"
    peers = rows_of(text, "### Beside other libraries")[0]
    assert peers[5] == "80" and peers[7] == "50" and peers[9].endswith("(2.00 x)")
    assert "| MXFP4 A | 1 | read 80 % of 85 % | **missed** |" in text
    assert "| MXFP4 A | 1 | ggml 2.00 x of 1.60 x | met |" in text
    every = rows_of(text, "### Every format")[0]
    assert every[5:8] == ["80", "40", "80"], "of 25 GB/s to read and 40 to decode"
    narrow = rows_of(text, "### Every format on avx2")[0]
    assert narrow[5:8] == ["80", "30", "80"], "of 25 GB/s to read and 30 to decode"
    assert "| MXFP4 A | 2 | 1 | ggml 2.00 x of 1.00 x | met |" in text, "a bar of AVX2"
    assert rows_of(text, "### Fork-join")[1][4] == "", "nobody has to answer"


def test_newest_first(tmp_path: Path) -> None:
    for date in ("2026-01-02", "2026-03-04"):
        write_receipt(tmp_path / f"{date}-p.json", report.join(every_bench()) | {"date": date})
    report.render(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.index("2026-03-04") < text.index("2026-01-02")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("results")
    report.store(report.join(every_bench()), folder)
    report.render(folder)
    return folder


def test_pictures_are_on_the_page(pictures: Path) -> None:
    drawn = sorted(path.name for path in pictures.glob("2026-*.svg"))
    assert len(drawn) == 2
    text = (pictures / "README.md").read_text()
    assert all(f"]({name})" in text for name in drawn)


@pytest.mark.parametrize(
    ("bench", "shown"),
    [
        ("roofline", ["hybrid_moe", "ggml", "P (x), 2 cores", "tokens in a call"]),
        ("moe-layer", ["MXFP4 A, avx2, threads: 2", "read bandwidth", "tokens", "64"]),
        ("peers", ["MXFP4 A, threads: 2", "hybrid_moe", "ggml", "ms per token"]),
    ],
)
def test_picture(pictures: Path, bench: str, shown: list[str]) -> None:
    root: Any = ET.parse(next(pictures.glob(f"*{bench}.svg"))).getroot()
    texts = {
        "".join(element.itertext()).strip() for element in root.iter() if "text" in element.tag
    }
    assert set(shown) <= texts


def _document(**benches: Any) -> dict[str, Any]:
    return {"processor": "P", "benches": {name: {"points": p} for name, p in benches.items()}}


def test_lines_go_from_few_tokens_to_many() -> None:
    """Measured 64, 1, 8: no line turns back."""
    plots = pytest.importorskip("plots")
    order = (64, 1, 8)
    ours = [peer_point("ours", [float(t)], 1.0, tokens=t, method="BF16") for t in order]
    for figure in (
        plots.times(_document(peers=ours)["benches"]["peers"]),
        plots.shares({"points": [layer_point(tokens=t) for t in order]}),
        plots.roofline(_document(peers=ours)),
    ):
        lines = [list(line.get_xdata()) for panel in figure.axes for line in panel.lines]
        assert [1, 8, 64] in lines
        assert all(xs == sorted(xs) for xs in lines)


def test_rows_of_a_layer_are_together(tmp_path: Path) -> None:
    """In the order in which layers came, from few tokens to many."""
    measured = [(64, 2), (1, 1), (1, 2)]
    points = [peer_point("ours", [2.0], 1.0, tokens=t, threads=n) for t, n in measured]
    receipts = [r for r in every_bench() if r["bench"] != "peers"]
    report.store(report.join([*receipts, machine("peers", points=points, errors=[])]), tmp_path)
    report.render(tmp_path)
    rows = rows_of((tmp_path / "README.md").read_text(), "### Beside other libraries")
    assert [(int(row[2]), int(row[1])) for row in rows] == [(1, 2), (64, 2), (1, 1)]


def test_shares_of_the_ceiling() -> None:
    """40 MB at 25 GB/s take 1.6 ms; 100 M multiplications at 100 G a second 1 ms, 1600 M 16 ms."""
    plots = pytest.importorskip("plots")
    points = [
        peer_point("ours", [2.0], 1.0),
        peer_point("ours", [20.0], 1.0, tokens=64, macs=1600e6),
        peer_point("ggml", [4.0], 2.0),
        peer_point("ours", [1.6], 1.0, method="BF16", threads=64),
    ]
    layer, lines = plots.ceiling_shares(_document(peers=points))
    assert layer == "MXFP4, layer A, 2 threads", "where there is somebody to compare with"
    assert lines["ours"] == [(1, pytest.approx(80)), (64, pytest.approx(80))]
    assert lines["ggml"] == [(1, pytest.approx(40))]
    best, other = layer_point(), layer_point(isa="portable", ms=20.0, tokens=4, rate=1.0)
    layer, lines = plots.ceiling_shares(_document(moe_layer=[best, other]))
    assert lines == {"ours": [(1, pytest.approx(80))]}, "the machine's own tier"
    with pytest.raises(ValueError, match="no measured layer"):
        plots.ceiling_shares(_document(pool=[]))


def test_the_same_points_draw_the_same_file(pictures: Path, tmp_path: Path) -> None:
    report.store(report.join(every_bench()), tmp_path)
    report.render(tmp_path)
    for path in pictures.glob("*.svg"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
