"""Predictions promise no larger share of the ceilings than every stored measurement reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.planning.prediction import MAC_SHARE, READ_SHARE

RECEIPTS = [
    file
    for file in sorted((Path(__file__).parents[3] / "docs" / "results").glob("*.json"))
    if "moe_layer" in json.loads(file.read_text("utf-8"))["benches"]
]


def points(receipt: Path, tokens: int) -> list[dict[str, Any]]:
    """One MoE layer on all threads in the processor's own tier, the best of those measured."""
    measured = json.loads(receipt.read_text("utf-8"))["benches"]["moe_layer"]["points"]
    order = list(TIERS)
    own = max((point["isa"] for point in measured), key=order.index)
    threads = max(point["threads"] for point in measured)
    found = [
        point
        for point in measured
        if (point["tokens"], point["threads"], point["isa"]) == (tokens, threads, own)
    ]
    assert found
    return found


def test_there_are_measurements() -> None:
    assert RECEIPTS


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda file: file.stem)
def test_shares_are_no_promises_beyond_what_was_measured(receipt: Path) -> None:
    reads = [p["weight_bandwidth"] / p["read_bandwidth"] for p in points(receipt, 1)]
    macs = [p["rate"] / p["rate_ceiling"] for p in points(receipt, 1024)]
    assert min(reads) >= READ_SHARE
    assert min(macs) >= MAC_SHARE
