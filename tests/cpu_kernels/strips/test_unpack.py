"""Unpacking is the inverse of packing, bit for bit, however pools share the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.table import DENSE_FORMATS
from tests.cpu_kernels.cases import Case

POOLS = [PoolConfig(1)] + ([PoolConfig(2, pools=2)] if usable_cores() > 1 else [])


@pytest.mark.parametrize("method", DENSE_FORMATS)
@settings(max_examples=15)
@given(
    st.integers(1, 7), st.integers(1, 7), st.booleans(), st.sampled_from(POOLS), st.integers(0, 99)
)
def test_unpack_returns_what_was_loaded(
    method: str, H: int, I: int, bias: bool, pool: PoolConfig, seed: int
) -> None:
    case = Case.random(DENSE_FORMATS[method], 32 * H, 32 * I, E=3, seed=seed, bias=bias)
    layer = case.layer("portable", pool, only=[0, 2])
    for expert in (2, 0):
        unpacked = layer.unpack(expert)
        for name in ("gate", "up", "down"):
            given, found = getattr(case.experts[expert], name), getattr(unpacked, name)
            for part in ("codes", "scales", "bias"):
                before, after = getattr(given, part), getattr(found, part)
                if before is None:
                    assert after is None
                else:
                    assert before.dtype == after.dtype
                    np.testing.assert_array_equal(before, after)
    layer.close()


def test_only_loaded_experts_of_an_open_layer_can_be_unpacked() -> None:
    layer = Case.random(DENSE_FORMATS["MXFP4"], 32, 32, E=3).layer("portable", only=[1])
    for expert in (-1, 0, 3):
        with pytest.raises(IndexError, match=f"expert {expert} is not loaded"):
            layer.unpack(expert)
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.unpack(1)
