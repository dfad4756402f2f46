"""The runner on streams: deferral, and what workers report."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.streams.graph_job import Report
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.runner import LayerRunner
from hybrid_moe.streams.buffers import BufferPool
from hybrid_moe.streams.staging import Stager
from tests.hybrid_moe.members import Layer
from tests.hybrid_moe.streams.fake_graph_jobs import FakeLayer, random_batch
from tests.streams.emulation import Device

E, K, H = 6, 2, 32


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_batch(tokens, E, K, H)


@dataclass
class Model:
    """Runners of consecutive layers on one fake stream."""

    deferred: int = 0
    strict: bool = False
    count: int = 1
    resident: torch.Tensor = field(default_factory=lambda: torch.ones(E, dtype=torch.bool))

    def __post_init__(self) -> None:
        self.layers = [FakeLayer(H, E) for _ in range(self.count)]
        self.gpu = Device(random.Random(0), has_flags=False)
        self.gpu.python = {k: v for m in self.layers for k, v in m.functions.items()}
        self.stream = self.gpu.stream()
        self.mask = torch.zeros(E, dtype=torch.bool)
        shapes = [LayerShape(i, E, K, H, 32) for i in range(self.count)]
        self.members: list[Layer] = []
        chain = DeferralChain()
        self.runners = []
        for shape, layer in zip(shapes, self.layers, strict=True):
            self.members.append(Layer(shape.layer_idx, hidden_size=H))
            chain.join(self.members[-1])
            runner: Any = LayerRunner(
                layer,  # type: ignore[arg-type]
                shape,
                self.mask,
                self.resident.numpy(),
                chain,
                deferred=self.deferred,
                strict=self.strict,
            )
            runner._stream = lambda device, handle: self.stream
            runner._stager = Stager(layer, self.mask, BufferPool())  # type: ignore[arg-type]
            self.runners.append(runner)

    def forward(self, layer: int, inputs: Any) -> torch.Tensor:
        self.runners[layer].submit(*inputs, 1)
        result: torch.Tensor = self.runners[layer].sync(inputs[0], 1)
        return result


def test_runner_defers_across_layers_on_a_stream() -> None:
    model = Model(deferred=1, count=2)
    hidden = torch.ones(1, H, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[1, 3]]), torch.tensor([[0.75, 0.25]])
    first = model.forward(0, (hidden, ids, weights))
    second = model.forward(1, (hidden, torch.tensor([[-1, -1]]), weights))
    assert first.isnan().all() and second.isnan().all()
    model.gpu.run()
    assert set(first.flatten().tolist()) == {0.75 * 2}
    assert set(second.flatten().tolist()) == {0.25 * 4}
    assert not model.gpu.entered


def test_runner_raises_what_workers_report() -> None:
    model = Model()
    model.forward(0, batch(2))
    for report, message in (
        (Report(0, 0, -1, "worker 3 died"), "layer 0: worker 3 died"),
        (Report(0, 2, 4, None), "routed to expert 4"),
    ):
        model.layers[0].next_report = report
        with pytest.raises(RuntimeError, match=message):
            model.forward(0, batch(2))
    model.layers[0].next_report = Report(5, 0, -1, None)
    model.forward(0, batch(2))
    assert model.runners[0].ignored_ids == 5


def test_runner_is_strict_at_a_later_call() -> None:
    model = Model(strict=True)
    model.forward(0, batch(2))
    model.layers[0].next_report = Report(5, 0, -1, None)
    with pytest.raises(IndexError, match="5 of the ids"):
        model.forward(0, batch(2))


def test_runner_refuses_what_it_could_not_check() -> None:
    model = Model(deferred=1, strict=True, count=2)
    with pytest.raises(ValueError, match="strict=True cannot tell"):
        model.forward(0, batch(2))
    model = Model(resident=torch.arange(E) != 2)
    with pytest.raises(RuntimeError, match="expert 2, which gpu_experts_mask no longer"):
        model.forward(0, batch(2))
