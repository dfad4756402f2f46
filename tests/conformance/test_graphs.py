"""Clauses of CUDA graphs, with `--on-device cuda` only: submit and sync may be captured, for
announced batch sizes and others, and every replay works on what the inputs hold then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .kit import Batch, Kit, assert_close

REPLAYS = 3  # a flag that a capture has frozen is still right at the first one


@pytest.fixture(autouse=True)
def _needs_a_gpu(kit: Kit) -> None:
    if kit.device.type != "cuda":
        pytest.skip("needs a GPU: --on-device cuda")


class Captured:
    """Some layers, one after the other, in a graph; `submit` masks the ids in place as SGLang
    does."""

    def __init__(self, kit: Kit, wrappers: list[Any], tokens: int) -> None:
        self.kit, self.wrappers, self.batch = kit, wrappers, kit.batch(tokens)
        side = torch.cuda.Stream(kit.device)
        side.wait_stream(torch.cuda.current_stream(kit.device))
        with torch.cuda.stream(side):
            self._run()  # runtimes warm up before they capture
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self._run()

    def _run(self) -> list[torch.Tensor]:
        outputs = []
        for wrapper in self.wrappers:
            ids = self.batch.ids.clone()
            inputs = (self.batch.hidden, ids, self.batch.weights)
            wrapper.submit_forward(*inputs, self.kit.stream)
            ids.fill_(-1)
            output = wrapper.sync_forward(self.batch.hidden, self.kit.stream)
            outputs.append(output.clone())
        return outputs

    def replay(self, batch: Batch) -> None:
        """Replay on `batch` and check every layer."""
        for captured, given in zip(self.batch.args, batch.args, strict=True):
            captured.copy_(given)
        self.graph.replay()
        torch.cuda.synchronize()
        for layer, output in enumerate(self.outputs):
            expected = self.kit.weights[layer].forward(batch)
            assert_close(output.double().cpu().numpy(), expected)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_captured_layers_compute_what_the_inputs_hold_at_replay(
    kit: Kit, tokens: int, announced: bool
) -> None:
    if announced:
        kit.implementation.set_capture_batch_sizes([tokens])
    captured = Captured(kit, [kit.load(layer_idx=layer) for layer in range(3)], tokens)
    for seed in range(REPLAYS):
        captured.replay(kit.batch(tokens, 1 + seed))


def test_graphs_of_several_sizes_may_alternate_with_eager_calls(kit: Kit) -> None:
    kit.implementation.set_capture_batch_sizes([1, 4])
    wrappers: list[Any] = [kit.load(layer_idx=layer) for layer in range(2)]
    graphs = [Captured(kit, wrappers, tokens) for tokens in (1, 4, 6)]
    for seed in range(REPLAYS):
        for captured in graphs:
            captured.replay(kit.batch(len(captured.batch.hidden), 1 + seed))
        batch = kit.batch(9, seed)
        assert_close(kit.forward(wrappers[0], batch), kit.weights[0].forward(batch))
        kit.implementation.clear_buffer_cache()
