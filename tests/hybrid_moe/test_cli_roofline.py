"""What `generate` says of its speed: bytes, shares and the limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid_moe.cli.roofline import Roofline, WaitClock, bytes_of_a_token
from hybrid_moe.planning import read_model
from hybrid_moe.planning.reading import token_reads
from tests.hybrid_moe.command import write_model

GB = 10**9


def answer(seconds: float, tokens: int = 10) -> Any:
    """Decoded so many tokens behind the first, each in so many seconds."""
    return SimpleNamespace(times=tuple(1 + seconds * i for i in range(tokens + 1)))


@pytest.mark.parametrize(
    ("seconds", "waited", "share", "limit"),
    [
        # 2 GB at 20 GB/s are 0.1 s
        (0.11, 0.105, 91, "memory"),
        (0.5, 0.12, 20, "torch: 76 % of the time is outside kernels"),
        (0.5, 0.45, 20, "compute: kernels take 4.5 times as long as reading"),
        (0.05, 0.05, 200, "memory"),  # from the caches
        (0.3, 9.0, 33, "compute: kernels take 3.0 times"),  # of several threads
    ],
)
def test_what_limits(seconds: float, waited: float, share: int, limit: str) -> None:
    text = Roofline(20 * GB, 2 * GB).summary(answer(seconds), 10 * waited)
    assert text.startswith(f"{share} % of the roofline (2.00 GB a token at 20.0 GB/s); ")
    assert f"limited by {limit}" in text


def test_small_shares_and_models() -> None:
    text = Roofline(20 * GB, 4_200_000).summary(answer(0.1), 0.0)
    assert text.startswith("less than 1 % of the roofline (4.20 MB a token")


def test_waits_are_counted_meanwhile() -> None:
    class Group:
        def wait(self, sequence: int) -> None:
            waited.append(sequence)

    waited: list[int] = []
    clock, group = WaitClock(), Group()
    with clock.on(group):  # type: ignore[arg-type]
        group.wait(1)
        group.wait(2)
    counted = clock.seconds
    group.wait(3)
    assert waited == [1, 2, 3] and clock.seconds == counted > 0
    assert "wait" not in vars(group)


def test_the_bytes_are_those_of_plan(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    for method, dense in ((None, "bf16"), ("MXFP4", "bf16"), ("MXFP4", "torch")):
        model = read_model(path, method=method, dense=dense)
        assert bytes_of_a_token(path, method, dense, 50) == token_reads(model, 50).total
    # keys and values of two layers, two heads of 16, BF16
    grown = bytes_of_a_token(path, None, "bf16", 51) - bytes_of_a_token(path, None, "bf16", 50)
    assert grown == 2 * 2 * 2 * 16 * 2
