"""Whole models: arithmetic of the table, README's table, and an engine at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import end_to_end
import front_page
import pytest
from end_to_end import Point
from peer.interface import UnavailableError
from synthetic.checkpoint import make_checkpoint
from synthetic.models import MODELS
from tables import END_TO_END
from tables import rows as table_rows
from whole_model import clock
from whole_model.torch_engines import Eager
from whole_model.worker import Worker

from hybrid_moe.planning import CpuSpeeds, read_model
from hybrid_moe.planning.reading import token_reads


def point(engine: str, **changes: Any) -> Point:
    """Two rounds: 100 tokens of a prompt in 2 and in 4 s, 5 and 4 tok/s of 2 GB each."""
    made = Point(
        model="m", engine=engine, label=f"{engine} 1.0", dense="bf16", context=100, computed=True,
        threads=2, token_bytes=2 * 10**9, planned=4 * 10**9, prefill_s=[2.0, 4.0],
        decode=[5.0, 4.0], reads=[20.0, 16.0], shares=[0.5, 0.5], peak_s=[1.0, 1.0],
        peak_rss=[3 * 10**9, 2 * 10**9], predicted_decode=[4.0, 4.0],
        predicted_prefill=[50.0, 25.0], others=[0.0, 0.02],
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_rows() -> None:
    peer = point("llama.cpp", decode=[2.5, 4.0], prefill_s=[6.0, 4.0], planned=None)
    mine, theirs = end_to_end.rows([point("ours"), peer])
    assert mine["prefill_tokens_per_s"] == pytest.approx(100 / 3)
    assert mine["prefill_share"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert mine["decode_tokens_per_s"] == 4.5 and mine["roofline"] == pytest.approx(9)
    assert mine["decode_share"] == 0.5
    assert mine["memory"] == 3 * 10**9 and mine["ours_decodes_faster"] is None
    assert mine["decode_of_plan"] == pytest.approx((5 / 4 + 1) / 2)
    assert mine["prefill_of_plan"] == pytest.approx(1)
    assert theirs["ours_decodes_faster"] == pytest.approx((2 + 1) / 2)
    assert theirs["ours_prefills_faster"] == pytest.approx((3 + 1) / 2)
    header, (first, second) = table_rows(END_TO_END, [mine, theirs])
    row = dict(zip(header, first, strict=True))
    assert row["% of it"] == "50" and row["memory / plan"] == "0.750"
    assert "1.50 x" in second and "1.50 x" not in first


def test_the_share_is_of_the_bandwidth_of_the_same_seconds() -> None:
    """2 GB a token: 8 tokens at 10 GB/s where 20 could be read, 8 at 20 of 40, 4 at 5 of 10; and
    one token that was held up, in a slice of its own."""
    seconds = [0.2] * 8 + [0.1] * 8 + [0.4] * 4
    assert end_to_end.read_share(2 * 10**9, seconds, [15, 25, 55, -35]) == pytest.approx(0.5)
    held_up = [0.1] * 8 + [0.1] * 8 + [9.0]
    assert end_to_end.read_share(2 * 10**9, held_up, [40, 40, 40, 40]) == pytest.approx(0.5)


def test_a_clock_stands_still_while_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    class Probe:
        def measure(self, seconds: float) -> float:
            now[0] += 100.0
            return 30.0

    ticking = clock.TokenClock(Probe())  # type: ignore[arg-type]
    ticking.start()
    for _ in range(12):
        now[0] += 0.5
        ticking.token()
    ticking.finish()
    assert ticking.prefill == 0.5 and ticking.seconds == [0.5] * 11
    assert ticking.reads == [30.0] * 3, "before, after eight, at the end"


def test_a_filled_context_has_no_prefill() -> None:
    filled = point("ours", computed=False, prefill_s=[], peak_s=[], predicted_prefill=[])
    (row,) = end_to_end.rows([filled])
    assert row["prefill_tokens_per_s"] is None and row["prefill_of_plan"] is None
    header, (texts,) = table_rows(END_TO_END, [row])
    assert dict(zip(header, texts, strict=True))["context"] == "100, filled"


def test_readme_is_written_from_the_newest_results(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{front_page.BEGIN}old\n{front_page.END}after\n")
    assert front_page.write(page, tmp_path) == [] and "old" in page.read_text()
    points = end_to_end.rows([point("ours"), point("llama.cpp", decode=[2.5, 2.0])])
    for day, benches in (("01", {"end_to_end": {"points": points}}), ("02", {"pool": {}})):
        document = {"date": f"2026-01-{day}", "processor": "P, 2 cores", "benches": benches}
        (tmp_path / f"2026-01-{day}-p.json").write_text(json.dumps(document))
    assert front_page.write(page, tmp_path) == [page]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{front_page.END}after\n")
    assert "old" not in text and "| m, bf16 | 100 | 4.5 | 50 | 2.00 x | 33.3 |" in text
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no place"):
        front_page.write(page, tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(MODELS["small"], tmp_path_factory.mktemp("models"), threads=2)


def test_ours_continues_a_prompt_and_a_filled_cache(small: Path) -> None:
    worker = Worker("ours")
    worker.setup(str(small), [], "torch", threads=1, context=320, vocabulary=4096)
    made = worker.run(context=12, new=5, computed=True)
    assert len(made["tokens"]) == 5 and len(made["seconds"]) == 4 and made["prefill"] > 0
    assert worker.run(context=12, new=5, computed=True)["tokens"] == made["tokens"]
    filled = worker.run(context=300, new=3, computed=False)
    assert len(filled["tokens"]) == 3 and len(filled["seconds"]) == 2
    assert worker.memory()["peak_rss"] > 10**7


def test_transformers_is_left_out_where_it_does_not_fit(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 10**6}))
    with pytest.raises(UnavailableError, match="BF16 weights do not fit"):
        Eager(small, [], "bf16", 1, 64)


def test_a_forecast_has_the_cache_that_the_answer_has(small: Path) -> None:
    """Recomputed: bytes over speeds; decode reads the cache at its length, not at half of it."""
    model = read_model(small)
    speeds = CpuSpeeds(30e9, {"MXFP4": 200e9, "BF16": 200e9}, "as given")
    short, long = (end_to_end.forecast(model, speeds, tokens, 2) for tokens in (64, 1 << 16))
    grown = token_reads(model, 1 << 16).cache - token_reads(model, 64).cache
    assert 1 / long.decode.tokens_per_second - 1 / short.decode.tokens_per_second == pytest.approx(
        sum(t.seconds for t in long.decode.terms if t.name == "KV cache")
        - sum(t.seconds for t in short.decode.terms if t.name == "KV cache")
    )
    assert grown > 0
