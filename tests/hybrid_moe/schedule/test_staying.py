"""Sent experts that stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.schedule.staying import MARGIN, staying


def test_the_least_used_leave_first() -> None:
    use = [0.5, 0.1, 0.2, 0.4, 0.3, 0.11]
    resident = [False, True, True, True, False, False]
    assert staying([0, 4, 5], use, resident) == ((0, 1), (4, 2))
    assert staying([5], use, resident) == ()  # a tenth more than expert 1 is no reason
    assert staying([], use, resident) == ()
    assert staying([0], use, [False] * 6) == ()
    with pytest.raises(ValueError, match="expert 1 was sent although it is resident"):
        staying([1], use, resident)
    with pytest.raises(ValueError, match=r"use has shape \[6\] and resident \[5\]"):
        staying([0], use, resident[:5])


@given(st.lists(st.floats(0, 1), min_size=4, max_size=12), st.integers(0, 2**32 - 1))
def test_places_settle_where_use_does(use: list[float], seed: int) -> None:
    """Whatever is sent, places change hands only for the better, and so not for ever."""
    rng = np.random.default_rng(seed)
    resident = rng.random(len(use)) < 0.5
    for _ in range(3 * len(use)):
        cold = np.flatnonzero(~resident)
        sent = rng.permutation(cold)[: rng.integers(0, 3)].tolist()
        before = sum(u for u, r in zip(use, resident, strict=True) if r)
        for new, old in staying(sent, use, resident):
            assert resident[old] and not resident[new] and use[new] > MARGIN * use[old]
            resident[new], resident[old] = True, False
        assert sum(u for u, r in zip(use, resident, strict=True) if r) >= before
