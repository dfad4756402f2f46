"""The tuner up to the card: candidates, their launches, what it says about times."""

from __future__ import annotations

import dataclasses
from typing import Any

import gpu_tune
import pytest
import torch
from gpu_tune import Card, candidates, gemm_configs, make_problem, slots_needed, verdict
from problem import SHAPES, Shape

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.table import BF16, MXFP4, WeightFormat
from hybrid_moe.gpu_kernels.down import down_ref
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.gate_up import gate_up_ref
from hybrid_moe.gpu_kernels.gemm_config import gemm_config
from hybrid_moe.gpu_kernels.toolchain import Availability
from tests.gpu.harness import simulate

CARD = Card("a card", 99 << 10, 48 << 20, 20 << 30, pdl=True)
SMALL = Shape("tiny", "none", 64, 96, 6, 2, biased=True, limit=7.0, alpha=1.702)


@pytest.mark.parametrize("fmt", [MXFP4, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("kernel", gpu_tune.KERNELS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_candidates_are_launches_of_the_kernel(kernel: str, tokens: int, fmt: WeightFormat) -> None:
    """One for each choice, all with values for their arguments."""
    problem = make_problem(fmt, SMALL, tokens, 6, torch.device("cpu"), pdl=False)
    found = candidates(kernel, problem, CARD)
    assert len({candidate.row for candidate in found}) == len(found)
    for candidate in found:
        for launch in candidate.launches(1):
            assert len(launch.values) == len(launch.definition.arguments)
            assert launch.definition.name.startswith(kernel)
            assert launch.definition.shared_bytes <= CARD.shared_bytes
            assert min(launch.grid) > 0
            for argument, value in zip(launch.definition.arguments, launch.values, strict=True):
                assert isinstance(value, torch.Tensor) == bool(argument.align)
    assert (gpu_tune.bytes_read(kernel, problem) is None) == (kernel in ("pack", "combine"))


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_a_launch_computes_the_kernel(kernel: str) -> None:
    """The values of a launch are in their places: in the simulator it writes the rows of the
    reference. (Weights are tiny; rows differ by their experts' biases.)"""
    problem = make_problem(MXFP4, SMALL, 3, 6, torch.device("cpu"), pdl=False)
    packed, layout = problem.packed[1], problem.layout
    tables = {"gate_up": layout.gate_up_table, "down": layout.down_table}
    tiles = ExpertTiles(
        problem.memory,
        torch.from_numpy(tables[kernel]),
        torch.zeros(6, dtype=torch.int32),
        *packed[1:],
    )
    if kernel == "gate_up":
        activation = Activation(SMALL.limit, SMALL.alpha)
        expected = gate_up_ref(layout, activation, tiles, packed.xp, SMALL.top_k)
    else:
        expected = down_ref(layout, tiles, torch.zeros(6, 96, dtype=torch.bfloat16))
    assert expected.abs().max() > 0.1
    (launch,) = candidates(kernel, problem, CARD)[0].launches(1)
    simulate(launch.definition, "sm_80", launch.grid, launch.values)
    names = [argument.name for argument in launch.definition.arguments]
    out = launch.values[names.index("out")]
    torch.testing.assert_close(out, expected, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("tile", [8, 16, 32, 64])
@pytest.mark.parametrize("K", [768, 2880, 7168])
def test_gemm_candidates_begin_with_the_heuristic_and_keep_bits(K: int, tile: int) -> None:
    chosen = gemm_config("MXFP4", K, tile, biases=False)
    found = gemm_configs(chosen, CARD)
    assert found[0] == chosen and len(found) == len(set(found)) > 2
    assert {(c.ranges, c.tile, c.format) for c in found} == {(chosen.ranges, tile, "MXFP4")}
    assert all(c.shared_bytes <= CARD.shared_bytes and c.threads <= 256 for c in found[1:])
    none = dataclasses.replace(CARD, shared_bytes=0)
    assert gemm_configs(chosen, none) == [chosen]


def test_experts_do_not_stay_in_the_cache_and_fit_the_card() -> None:
    shape, nbytes = SHAPES["B"], 2_506_752
    assert slots_needed(shape, nbytes, CARD) == 128
    large = dataclasses.replace(CARD, l2_bytes=126 << 20)
    slots = slots_needed(shape, nbytes, large)
    assert slots > 128 and slots * nbytes >= 4 * large.l2_bytes > (slots - 1) * nbytes
    small = dataclasses.replace(CARD, free_bytes=300 << 20)
    with pytest.raises(SystemExit, match=r"128 experts of shape B take 0\.3 GB; a card has 0\.3"):
        slots_needed(shape, nbytes, small)


def _points(*times: float) -> list[dict[str, Any]]:
    about = {"kernel": "down", "format": "MXFP4", "H": 64, "I": 96, "tokens": 8, "tile": 8}
    return [{**about, "card": "a card", "row": f"row {i}", "us": us} for i, us in enumerate(times)]


def test_the_row_that_replaces_the_heuristic_names_the_card() -> None:
    text = verdict(_points(10.0, 12.0, 8.0, 9.0))
    assert "8.0 us instead of 10.0" in text and "row 2   # a card" in text
    assert "H = 64, I = 96, 8 tokens (tiles of 8)" in text


def test_what_gains_little_replaces_nothing() -> None:
    assert "the heuristic's choice stands, 10.0 us" in verdict(_points(10.0, 9.8, 12.0))


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "availability", lambda: Availability(False, "there is no GPU"))
    with pytest.raises(SystemExit, match="nothing to tune: there is no GPU"):
        gpu_tune.main([])
    with pytest.raises(SystemExit, match="unknown kernel mul: there are pack, gate_up"):
        gpu_tune.main(["--kernels", "mul"])
