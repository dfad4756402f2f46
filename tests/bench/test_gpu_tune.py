"""The tuner up to the card: candidates, their launches, what it says about times."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench import gpu_tune
from bench.gpu_check.kernels import Layer
from bench.gpu_check.workload import MODELS
from bench.gpu_tune import Card, Problem, candidates, gemm_configs, verdict
from hybrid_moe.gpu_kernels.down import down_ref
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.gate_up import gate_up_ref
from hybrid_moe.gpu_kernels.gemm_config import gemm_config
from hybrid_moe.gpu_kernels.toolchain import Availability
from tests.gpu.harness import simulate

CARD = Card("a card", 99 << 10, pdl=False)
SMALL = dataclasses.replace(MODELS[0].small(), experts=6)


@pytest.fixture(scope="module", params=["MXFP4", "BF16"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer.random(SMALL, request.param)


@pytest.mark.parametrize("kernel", gpu_tune.KERNELS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_candidates_are_launches_of_the_kernel(kernel: str, tokens: int, layer: Layer) -> None:
    """One for each choice, all with values for their arguments."""
    found = candidates(kernel, Problem.random(layer, tokens), CARD)
    assert len({candidate.row for candidate in found}) == len(found)
    assert len(found) > 1 or (kernel == "pack" and tokens == 200)
    for candidate in found:
        for launch in candidate.launches(0):
            assert launch.definition.name.startswith(kernel)
            assert launch.definition.shared_bytes <= CARD.shared_bytes
            assert min(launch.grid) > 0
            for argument, value in zip(launch.definition.arguments, launch.values, strict=True):
                assert isinstance(value, torch.Tensor) == bool(argument.align)


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_a_launch_computes_the_kernel(kernel: str) -> None:
    """The values of a launch are in their places: in the simulator it writes the rows of the
    reference."""
    layer = Layer.random(SMALL, "MXFP4")
    layer.memory[:, -4 * 128 :].random_(0x3E, 0x41)  # the biases of `down`: 0.18 to 3
    problem = Problem.random(layer, 3)
    packed, h = problem.packed[1], torch.zeros(12, 64, dtype=torch.bfloat16)
    tables = dict(zip(("gate_up", "down"), layer.tables, strict=True))
    tiles = ExpertTiles(layer.memory, tables[kernel], layer.wide, *packed[1:])
    if kernel == "gate_up":
        expected = gate_up_ref(layer.layout, SMALL.activation, tiles, packed.xp, SMALL.top_k)
    else:
        expected = down_ref(layer.layout, tiles, h)
    assert expected.abs().max() > 0.1
    (launch,) = candidates(kernel, problem, CARD)[0].launches(1)
    simulate(launch.definition, "sm_80", launch.grid, launch.values)
    names = [argument.name for argument in launch.definition.arguments]
    out = launch.values[names.index("out")]
    torch.testing.assert_close(out, expected, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("tile", [8, 16, 32, 64])
@pytest.mark.parametrize("K", [768, 2880, 7168])
def test_gemm_candidates_begin_with_the_heuristic_and_keep_bits(K: int, tile: int) -> None:
    chosen = gemm_config("MXFP4", K, tile, biases=True)
    found = gemm_configs(chosen, CARD)
    assert found[0] == chosen and len(found) == len(set(found)) > 2
    kept = {(c.ranges, c.tile, c.format, c.biases, c.pdl) for c in found}
    assert kept == {(chosen.ranges, tile, "MXFP4", True, False)}
    assert all(c.shared_bytes <= CARD.shared_bytes and c.threads <= 256 for c in found[1:])
    none = dataclasses.replace(CARD, shared_bytes=0)
    assert gemm_configs(chosen, none) == [chosen]


def _points(*times: float) -> list[dict[str, Any]]:
    about = {"kernel": "down", "model": "M", "format": "MXFP4", "tokens": 8, "tile": 8}
    return [{**about, "card": "a card", "row": f"row {i}", "us": us} for i, us in enumerate(times)]


def test_the_row_that_replaces_the_heuristic_names_the_card() -> None:
    text = verdict(_points(10.0, 12.0, 8.0, 9.0))
    assert "8.0 us instead of 10.0" in text and "row 2   # a card" in text
    assert "down, M in MXFP4, 8 tokens (tiles of 8)" in text


def test_what_gains_little_replaces_nothing() -> None:
    assert "the heuristic's choice stands, 10.0 us" in verdict(_points(10.0, 9.8, 12.0))


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "availability", lambda: Availability(False, "there is no GPU"))
    with pytest.raises(SystemExit, match="nothing to tune: there is no GPU"):
        gpu_tune.main([])
    with pytest.raises(SystemExit, match="unknown kernel mul: there are pack, gate_up"):
        gpu_tune.main(["--kernels", "mul"])
    with pytest.raises(SystemExit, match="unknown model GPT: there are gpt-oss-120b, V4-Flash"):
        gpu_tune.main(["--models", "GPT"])
