"""`hybrid-moe bench`: its tables and its receipt; no times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.cpu_kernels.ceilings import bandwidth
from hybrid_moe.planning.receipt import receipt


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "ceilings", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones are far beyond the caches, and take seconds to get."""
    real = bandwidth.ReadProbe
    monkeypatch.setattr(bandwidth, "ReadProbe", lambda pool: real(pool, 1 << 20, block=64 << 10))


def test_tables_and_receipt(tmp_path: Path) -> None:
    file = tmp_path / "ceilings.json"
    result = run("--threads", 1, "--tiers", "portable", "--seconds", 0.001, "--json", file)
    assert result.exit_code == 0, result.output
    assert "random 4 MiB blocks" in result.output and "MXFP4 by byte_dot" in result.output
    document = json.loads(file.read_text())
    assert document["bench"] == "ceilings" and document["processor"] and document["versions"]
    assert [row["where"] for row in document["reads"]][:2] == ["1 thread", "all threads"]
    assert all(row["in_order"] > 0 and row["at_random"] > 0 for row in document["reads"])
    assert {row["tier"] for row in document["peaks"]} == {"portable"}
    assert all(row["one_thread"] > 0 and row["all_threads"] > 0 for row in document["peaks"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tiers", "abacus"), "no tier abacus"),
        (("--threads", 100_000), "cores"),
        (("--json", "/nowhere/x.json"), "/nowhere/x.json"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    result = run("--seconds", 0.001, *arguments)
    assert result.exit_code == 2 and message in result.output


def test_receipt_names_the_machine() -> None:
    document = receipt("x", points=[1], threads=2)
    assert set(document) == {"bench", "date", "processor", "versions", "points", "threads"}
