"""Plans with experts that travel: how many, and in which chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.planning import make_plan, read_model
from hybrid_moe.planning.plan import GPU, Plan, Shortage
from hybrid_moe.planning.streaming import CHUNKS, best_chunk
from hybrid_moe.planning.terms import Prediction
from tests.hybrid_moe.planning.cases import GIB, request
from tests.hybrid_moe.planning.conftest import Fake


@pytest.fixture
def plain(fake: Fake) -> Plan:
    """Qwen3-30B-A3B without a hot expert, 4096 tokens at once."""
    model = read_model(fake("Qwen3-30B-A3B-MXFP4"), gpu_backend="cute")
    return make_plan(model, request("16GB", context=8192, chunk=4096, num_gpu_experts=0))


def test_more_memory_for_experts_on_their_way_is_faster(plain: Plan) -> None:
    """Until both halves end together: never twice as fast as the slower of them alone."""
    rates, sent = [], []
    for memory in (0, GIB // 4, GIB, 3 * GIB, 4 * GIB):
        plan = make_plan(plain.model, replace(plain.request, stream_memory=memory))
        rates.append(plan.prefill.tokens_per_second)
        (part,) = [p for p in plan.parts if p.name == "streamed prefill"] or [None]
        assert (part is None) == (memory == 0)
        if part is not None:
            assert (part.place, part.nbytes) == (GPU, memory)
        link = [term for term in plan.prefill.terms if term.name == "link"]
        sent.append(link[0].seconds if link else 0.0)
    assert rates == sorted(rates) and rates[-1] > 1.5 * rates[0]
    assert sent == sorted(sent) and sent[0] == 0 < sent[1]
    assert rates[-1] == pytest.approx(rates[-2], rel=0.05)


def test_the_smallest_chunk_that_is_nearly_the_fastest(plain: Plan) -> None:
    """Of those that fit."""

    def plan_of(size: int) -> Plan:
        speed = {512: 50.0, 1024: 80.0, 2048: 98.0, 4096: 100.0, 8192: 300.0}[size]
        shortages = (Shortage("a GPU", 2, 1, ("more",)),) if size == 8192 else ()
        return replace(
            plain,
            request=replace(plain.request, chunk=size),
            prefill=Prediction(speed, (), "", ""),
            shortages=shortages,
        )

    assert best_chunk(plan_of, 10_000).request.chunk == 2048
    assert best_chunk(plan_of, 1025).request.chunk == 1024
    assert best_chunk(plan_of, 8193).request.chunk == 2048
    assert best_chunk(lambda size: replace(plan_of(size), shortages=plan_of(8192).shortages),
                      10_000).request.chunk == CHUNKS[0]  # fmt: skip


def test_the_command_chooses_a_chunk(fake: Fake) -> None:
    words = ("serve", "--model", str(fake("Qwen3-30B-A3B-MXFP4")), "--gpu", "16GB", "--dry-run",
             "--gpu-backend", "cute", "--ram-bandwidth", "80", "--gmacs", "1000", "--threads", "16",
             "--pools", "1", "--stream-prefill", "2GiB", "--chunk", "0")  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    sizes = [f"--chunked-prefill-size {size} " for size in CHUNKS]
    assert sum(size in result.stdout for size in sizes) == 1
