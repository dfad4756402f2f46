"""The quick check: what it calls slower, and which stored run it compares with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quick
from quick import Figure, speed, verdict

from hybrid_moe.planning.receipt import write_receipt


def share(value: float) -> Figure:
    return Figure("share", value, "%", higher_is_better=True)


def time(value: float) -> Figure:
    return Figure("time", value, "us", higher_is_better=False)


@pytest.mark.parametrize(
    ("now", "stored", "word"),
    [
        (share(84), share(100), "SLOWER"),
        (share(86), share(100), "same"),
        (share(130), share(100), "faster"),
        (time(1.2), time(1.0), "SLOWER"),
        (time(1.1), time(1.0), "same"),
        (time(0.5), time(1.0), "faster"),
        (share(1), None, "nothing stored"),
    ],
)
def test_verdict(now: Figure, stored: Figure | None, word: str) -> None:
    assert verdict(now, stored) == word


def test_speed_of_a_time_is_its_inverse() -> None:
    assert speed(time(2.0), time(1.0)) == 0.5 and speed(share(2.0), share(1.0)) == 2.0


def document(date: str, processor: str, **benches: Any) -> dict[str, Any]:
    return {"date": date, "processor": processor, "benches": benches}


def test_newest_of_the_same_processor(tmp_path: Path) -> None:
    for i, (date, processor, value) in enumerate(
        [("2026-01-01", "P", 1.0), ("2026-02-01", "P", 2.0), ("2026-03-01", "Q", 3.0)]
    ):
        point = {"name": "share", "value": value, "unit": "%", "higher_is_better": True}
        stored = document(date, processor, quick={"points": [point]})
        write_receipt(tmp_path / f"{date}-{i}.json", stored)
    write_receipt(tmp_path / "2026-04-01.json", document("2026-04-01", "P", load={"points": []}))
    assert quick.stored_figures(tmp_path, "P") == ("2026-02-01", {"share": share(2.0)})
    assert quick.stored_figures(tmp_path, "R") == (None, {})


@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, 1)])
def test_exit_status(strict: bool, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "layer_figures", lambda threads, seconds: ([share(50)], 0.0))
    monkeypatch.setattr(quick, "pool_figures", lambda threads, samples: [])
    monkeypatch.setattr(quick, "start_figure", lambda: time(1.0))
    stored = {"share": share(100), "time": time(1.0)}
    monkeypatch.setattr(quick, "stored_figures", lambda folder, machine: ("2026-01-01", stored))
    monkeypatch.setattr("sys.argv", ["quick.py", *(["--strict"] if strict else [])])
    assert quick.main() == status


def test_kernels_come_from_the_cache() -> None:
    assert quick.start_figure(rounds=1).value > 0
