"""The hand-over on a real GPU, in both ways. Run where there is one:

python -m pytest tests/streams/test_cuda.py
HYBRID_MOE_HANDOVER=host python -m pytest tests/streams/test_cuda.py
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from hybrid_moe import check_errors
from hybrid_moe.gpu_kernels.toolchain import availability
from hybrid_moe.streams.flags import HANDOVER, try_flags
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, Weights, wrapper
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures
from tests.reference import assert_within

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WEIGHTS = [Weights.random(seed=seed) for seed in range(3)]


@pytest.fixture(params=["flags", "host"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get(HANDOVER, request.param) != request.param:
        pytest.skip(f"{HANDOVER} asks for the other way")
    monkeypatch.setenv(HANDOVER, request.param)
    KTMoEWrapper.clear_buffer_cache()  # buffers keep the way that they were made for


def layers(deferred: int = 0) -> list[KTMoEWrapper]:
    # numa_nodes: threads of its own, apart from those of callers that work
    return [
        weights.load(wrapper(layer_idx=i, numa_nodes=[0], max_deferred_experts_per_token=deferred))
        for i, weights in enumerate(WEIGHTS)
    ]


def on_gpu(batch: Batch) -> Batch:
    return Batch(batch.hidden.cuda(), batch.ids.cuda(), batch.weights.cuda())


def forward(w: KTMoEWrapper, batch: Batch) -> torch.Tensor:
    """As a server does: the inputs are overwritten right after the submission."""
    stream = torch.cuda.current_stream().cuda_stream
    given = Batch(*(t.clone() for t in batch.args))
    w.submit_forward(*given.args, stream)
    given.hidden.fill_(float("nan"))
    given.ids.fill_(-1)
    given.weights.zero_()
    return w.sync_forward(batch.hidden, stream)


def test_memory_flags_work() -> None:
    try_flags(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_eager(tokens: int) -> None:
    for w in layers():
        for seed in range(20):
            batch = Batch.random(tokens, seed=seed)
            assert torch.equal(forward(w, on_gpu(batch)).cpu(), w.forward(*batch.args))
    check_errors()


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_graph(tokens: int, deferred: int) -> None:
    """Replays have the bits of eager steps, on new inputs and with eager steps in between."""
    model = layers(deferred)
    static = [on_gpu(Batch.random(tokens)) for _ in model]

    def step() -> list[torch.Tensor]:
        return [forward(w, batch) for w, batch in zip(model, static, strict=True)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for seed in range(10):
        for at, batch in enumerate(static):
            for target, value in zip(batch.args, Batch.random(tokens, seed + at).args, strict=True):
                target.copy_(value)
        expected = step()
        graph.replay()
        for output, eager in zip(outputs, expected, strict=True):
            assert torch.equal(output, eager)
    check_errors()


def test_graphs_of_many_sizes_never_announced() -> None:
    w, graphs = layers()[0], []
    for tokens in (1, 2, 3, 5, 8, 13):
        batch = on_gpu(Batch.random(tokens))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(w, batch)
        graphs.append((graph, batch, output))
    for _ in range(3):
        for graph, batch, output in reversed(graphs):
            graph.replay()
            assert torch.equal(output, forward(w, batch))
    check_errors()


def both_halves(backend: str, weights: Weights, **arguments: object) -> KTMoEWrapper:
    if backend == "cute" and not (here := availability()).usable:
        pytest.skip(here.reason)
    return weights.load(
        wrapper(
            gpu_experts_mask=torch.arange(E) < 3,
            gpu_backend=backend,
            gpu_slots=4,
            numa_nodes=[0],
            **arguments,
        )
    )


def move(w: KTMoEWrapper, rng: random.Random) -> int:
    """Move a random expert, if there is room; how many have moved."""
    expert = rng.randrange(E)
    hot = bool(w.gpu_experts_mask[expert])
    try:
        (w.demote if hot else w.promote)(expert, torch.cuda.current_stream().cuda_stream)
    except RuntimeError as error:
        assert "slots are taken" in str(error) or "no place on the CPU" in str(error)
        return 0
    return 1


@pytest.mark.parametrize("backend", ["torch", "cute"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_both_halves(tokens: int, backend: str) -> None:
    """Eager steps, with moves between submit and sync too."""
    w = both_halves(backend, signature_weights())
    rng, stream = random.Random(tokens), torch.cuda.current_stream().cuda_stream
    for seed in range(30):
        given = signature_batch(tokens, seed)
        batch = on_gpu(given)
        w.submit_forward(*batch.args, stream)
        batch.ids.fill_(-1)
        move(w, rng)
        out = w.sync_forward(batch.hidden, stream)
        move(w, rng)
        assert torch.equal(out.cpu(), signatures(given))
    w = both_halves(backend, WEIGHTS[0])
    given = Batch.random(tokens)
    assert_within(forward(w, on_gpu(given)).double().cpu().numpy(), WEIGHTS[0].expected(given))
    check_errors()


def test_both_halves_under_replay() -> None:
    """A thousand moves between replays with other ids."""
    w = both_halves("cute", signature_weights())
    rng, static = random.Random(0), on_gpu(signature_batch(5, 0))

    def step() -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        w.submit_forward(*static.args, stream)
        return w.sync_forward(static.hidden, stream)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    moves = 0
    while moves < 1000:
        for _ in range(4):
            moves += move(w, rng)
        given = signature_batch(5, moves)
        for target, value in zip(static.args, given.args, strict=True):
            target.copy_(value)
        graph.replay()
        assert torch.equal(output.cpu(), signatures(given))
    check_errors()
