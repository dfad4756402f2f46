"""Experts move between the CPU and an emulated GPU in the order of its streams.

The wrapper's runner, placement, staging and hand-over are real, and so are the CPU's jobs. Each of
the GPU's kernels is its reference in torch, queued on the stream as one piece of work. Experts are
their signatures: a job that sees a place or a slot which has been overwritten, or that goes by
another placement than its other half, gives another sum.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.weight_format import layer_formats
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.runtime import filling, hot_half
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.gpu_arguments import HotOptions
from hybrid_moe.runtime.hot_half import HotHalf
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.runtime.runner import LayerRunner
from hybrid_moe.runtime.weights import Stacked
from hybrid_moe.streams.buffers import BufferPool, Mailboxes
from hybrid_moe.streams.staging import Stager
from tests.hybrid_moe.cases import Batch, E, H, I, K
from tests.hybrid_moe.members import Layer
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures
from tests.streams.emulation import DEVICE, Device, EmulatedStream, Graph
from tests.streams.model import ManualGroup, ManualWatcher

WEIGHTS = signature_weights()
HOT, SLOTS = 3, 4
HASTE = ((1.0, 1.0), (0.02, 1.0), (1.0, 0.02))
"""How likely workers and the thread that launches jobs are to be next, compared to streams. Where
they are late, a move that does not wait for them comes in between."""


class QueuedSlots(SlotExperts):
    """Slots of the emulated GPU: what they compute, they compute when the stream comes to it."""

    gpu: Device

    def rows(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._queued((ids.numel(), H), torch.float32, super().rows, x, ids)

    def sums(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        as_queued = self.slot_of, self.wide
        compute = super().sums

        def sums(*of: torch.Tensor) -> torch.Tensor:
            now = self.slot_of, self.wide
            self.slot_of, self.wide = as_queued
            try:
                return compute(*of)
            finally:
                self.slot_of, self.wide = now

        return self._queued((len(ids), H), torch.float32, sums, x, ids, weights)

    def combine(self, y: torch.Tensor, *rest: Any) -> torch.Tensor:
        return self._queued((len(y) // K, H), torch.bfloat16, super().combine, y, *rest)

    def _queued(self, shape: tuple[int, int], dtype: torch.dtype, work: Any, *of: Any) -> Any:
        with _disable_current_modes():
            out = torch.full(shape, float("nan"), dtype=dtype)
        self.gpu.entered[-1].queue(work.__name__, lambda: out.copy_(work(*of)))
        return out


class Hybrid:
    """Two layers with both halves on emulated streams."""

    def __init__(
        self,
        seed: int,
        *,
        flags: bool,
        deferred: int,
        prefill: Callable[[Device], PrefillStream] | None = None,
    ) -> None:
        self.rng, self.group, self.watcher = random.Random(seed), ManualGroup(), ManualWatcher()
        self.gpu = Device(self.rng, would_block=self.group.would_block, has_flags=flags)
        workers, watcher = HASTE[seed % len(HASTE)]
        self.gpu.agents = [(workers, self.group.work), (watcher, self.watcher.look)]
        self.streams = [self.gpu.stream(0), self.gpu.stream(1)]
        self.on = self.streams[0]
        QueuedSlots.gpu = self.gpu
        pool = BufferPool(Mailboxes(lambda: self.watcher))
        chain, self.members = DeferralChain(), [Layer(i, hidden_size=H) for i in range(2)]
        prefill_stream = None if prefill is None else prefill(self.gpu)
        self.placements: list[ExpertPlacement] = []
        self.runners: list[LayerRunner] = []
        for member in self.members:
            chain.join(member)
            shape = LayerShape(member.layer_idx, E, K, H, I)
            layer = ExpertLayer(MXFP4, E, H, I, pool=self.group.config)
            layer._group = self.group
            options = HotOptions("torch", SLOTS, DEVICE, torch.zeros(E, dtype=torch.bool), False)
            half = HotHalf(options, shape, layer_formats(MXFP4), Activation())
            mask = torch.arange(E) < HOT
            placement = ExpertPlacement(layer, half, mask, member.layer_idx)
            stacked = {name: Stacked(getattr(WEIGHTS, name)) for name in ("gate", "up", "down")}
            filling.from_tensors(stacked, shape, layer_formats(MXFP4), torch.arange(E))(
                placement, np.ones(E, bool)
            )
            placement.ready()
            runner: Any = LayerRunner(
                layer,
                shape,
                placement.live,
                placement.cold,
                chain,
                deferred=deferred,
                strict=False,
                halves=(half, placement),
                prefill_stream=prefill_stream,
            )
            runner._stager = Stager(layer, placement.live, pool, torch.float32)
            if (streamed := runner._streamed) is not None:
                streamed.stager = Stager(layer, streamed.skip, pool, torch.float32)
            runner._stream = lambda tensor, handle: self.on
            self.placements.append(placement)
            self.runners.append(runner)
        self.checks: list[tuple[list[torch.Tensor], list[Batch]]] = []
        self.moves = 0
        self.dropped = False

    def move(self) -> None:
        """Queue a move of some expert of some layer, unless there is no room."""
        at, expert = self.rng.randrange(2), self.rng.randrange(E)
        hot = bool(self.placements[at]._mask[expert])
        self.on = self.rng.choice(self.streams)
        try:
            self.runners[at].move(expert, not hot, 0)
            self.moves += 1
        except RuntimeError as error:
            assert "slots are taken" in str(error) or "no place on the CPU" in str(error)

    def pause(self) -> None:
        self.gpu.run_some(self.rng.choice((0, 0, 3, 20)))

    def forward(self, given: list[Batch], collector: int, moves: int) -> list[torch.Tensor]:
        """Both layers; experts move before and behind each submission."""
        outputs = []
        main, other = self.streams[0], self.streams[collector]
        for runner, batch in zip(self.runners, given, strict=True):
            self.on = main
            runner.submit(*batch.args, 0)
            with main:  # the inputs' memory is used for something else
                batch.hidden.fill_(float("nan"))
                batch.ids.fill_(E + 9)
                batch.weights.fill_(float("nan"))
            for _ in range(self.rng.randrange(moves + 1)):
                self.move()
                self.pause()
            self.on = other
            outputs.append(runner.sync(batch.hidden, 0))
            if other is not main:
                main.wait(other.record())
            for _ in range(self.rng.randrange(moves + 1)):
                self.move()
        return outputs

    def step(self, tokens: int, seed: int) -> None:
        """An eager step."""
        values = [signature_batch(tokens, 2 * seed + i) for i in range(2)]
        given = [Batch(*(t.clone() for t in batch.args)) for batch in values]
        outputs = self.forward(given, self.rng.randrange(2), moves=2)
        self.checks.append((outputs, values))

    def capture(self, tokens: int) -> tuple[Graph, list[Batch], list[torch.Tensor]]:
        self.gpu.run()
        static = [signature_batch(tokens, i) for i in range(2)]
        with self.gpu.capture(self.streams[0]) as graph:
            outputs = self.forward(static, 0, moves=0)
        return graph, static, outputs

    def replay(self, captured: tuple[Graph, list[Batch], list[torch.Tensor]], seed: int) -> None:
        graph, static, outputs = captured
        main: EmulatedStream = self.streams[0]
        values = [signature_batch(len(static[0].ids), 2 * seed + i) for i in range(2)]
        with main:
            for target, source in zip(static, values, strict=True):
                for to, what in zip(target.args, source.args, strict=True):
                    to.copy_(what)
        graph.launch(main)
        with main:
            self.checks.append(([output.clone() for output in outputs], values))

    def verify(self) -> None:
        self.gpu.run()
        for outputs, values in self.checks:
            for placement in self.placements:
                placement.check_mask()
            total = signatures(values[0]) + signatures(values[1])
            assert torch.equal(outputs[0] + outputs[1], total)
        for at, runner in enumerate(self.runners):
            assert runner.take_error() is None
            routed = sum(int((values[at].ids >= 0).sum()) for _, values in self.checks)
            if not self.dropped:
                assert sum(runner.pairs) == routed, "each pair is counted once, hot or cold"


@pytest.fixture(autouse=True)
def queued(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hot_half, "SlotExperts", QueuedSlots)
    yield
    del QueuedSlots.gpu


SEEDS = [*range(7), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(7, 60))]


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_order(seed: int, flags: bool, deferred: int) -> None:
    """Eager steps, and replays of two graphs, with moves between them and inside."""
    model = Hybrid(seed, flags=flags, deferred=deferred)
    rng = model.rng
    model.step(2, 0)
    graphs = [model.capture(tokens) for tokens in (1, 3)]
    for seed in range(1, 8):
        if rng.random() < 0.5:
            model.step(rng.choice((1, 2, 5)), seed)
        else:
            model.replay(rng.choice(graphs), seed)
        for _ in range(rng.randrange(3)):
            model.move()
        model.pause()
    model.verify()
    assert model.moves > 5
    tables = [np.sort(p._slot[p._slot >= 0]).tolist() for p in model.placements]
    for placement, slots in zip(model.placements, tables, strict=True):
        on_device = placement._hot.experts
        assert on_device is not None and len(slots) == int(placement._mask.sum())
        assert on_device.slot_of.tolist() == placement._slot.tolist()
        assert (placement.live == 1).tolist() == placement._mask.tolist()


def check_a_place_is_kept(model: Hybrid) -> None:
    """A job has expert 7 in the place into which expert 0 is copied behind it."""
    runner, given = model.runners[0], signature_batch(3, 0)
    given.ids[:, 0] = 7
    model.gpu.agents = [(1.0, model.watcher.look)]
    runner.submit(*(t.clone() for t in given.args), 0)
    place = int(runner._layer._place[7])
    runner.move(7, True, 0)
    runner.move(0, False, 0)
    assert runner._layer._place[0] == place
    model.gpu.run_some(10_000)
    out = runner.sync(given.hidden, 0)
    model.gpu.agents.append((1.0, model.group.work))
    model.gpu.run()
    assert torch.equal(out, signatures(given))


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_a_place_is_not_overwritten_under_a_job(flags: bool) -> None:
    """The workers begin when the stream cannot get further without them: a job has expert 7 in the
    place into which expert 0 is copied behind it."""
    check_a_place_is_kept(Hybrid(0, flags=flags, deferred=0))


def test_no_move_under_capture() -> None:
    model = Hybrid(0, flags=True, deferred=0)
    model.step(1, 0)
    model.gpu.run()
    refused = pytest.raises(RuntimeError, match="cannot be moved while a CUDA graph is captured")
    with model.gpu.capture(model.streams[0]), refused:
        model.runners[0].move(0, False, 0)
    model.step(1, 1)
    model.verify()


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_a_submission_that_is_dropped_after_a_move(flags: bool) -> None:
    """Its buffers come back, and what follows is right."""
    model = Hybrid(3, flags=flags, deferred=0)
    model.dropped, runner = True, model.runners[0]
    for seed in range(4):
        runner.submit(*signature_batch(2, seed).args, 0)
        runner.move(E - 1, seed % 2 == 0, 0)
        runner.drop()
        model.pause()
    model.gpu.run()
    eager, _ = runner._stager._pool.count()
    assert eager == 1
    model.step(2, 9)
    model.verify()


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_a_hot_half_that_cannot_be_queued(flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's job is dropped with it, and the next step is right."""
    model = Hybrid(4, flags=flags, deferred=0)
    model.dropped = True
    model.step(2, 0)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("8 GiB")

        patch.setattr(QueuedSlots, "rows", fail)
        with pytest.raises(RuntimeError, match="no memory left"):
            model.runners[0].submit(*signature_batch(2, 1).args, 0)
    model.pause()
    model.step(2, 2)
    model.verify()
    assert model.runners[0]._stager._pool.count()[0] <= 2


def test_dropped_while_a_move_is_queued() -> None:
    """What the stream has still to change stays until it has."""
    model = Hybrid(5, flags=True, deferred=0)
    model.runners[0].move(0, False, 0)
    live = weakref.ref(model.placements[0].live)
    slots = weakref.ref(model.placements[0]._hot.experts)
    for owners in (model.runners, model.placements, model.members):
        owners.clear()
    gc.collect()
    assert live() is not None and slots() is not None
    model.gpu.run()
    keeping.release(most=None)
    gc.collect()
    assert live() is None


def test_slots_outlive_their_layer_in_a_graph() -> None:
    """A graph may be replayed when the layer has been dropped."""
    model = Hybrid(6, flags=True, deferred=0)
    model.step(1, 0)
    captured = model.capture(1)
    memory = weakref.ref(model.placements[0]._hot.experts.memory)  # type: ignore[union-attr]
    for owners in (model.runners, model.placements, model.members):
        owners.clear()
    del captured
    gc.collect()
    assert memory() is not None


def test_reading_an_expert_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been in another place before: its entry in the table is an old one."""
    model = Hybrid(7, flags=True, deferred=0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: model.gpu.run())
    runner = model.runners[0]
    for expert, hot in ((E - 1, True), (0, False), (E - 1, False)):
        runner.move(expert, hot, 0)
        model.gpu.run()
    expected = runner.unpack(0).down.codes.copy()
    runner.move(0, True, 0)
    assert np.array_equal(runner.unpack(0).down.codes, expected)
    runner.move(0, False, 0)
    assert np.array_equal(runner.unpack(0).down.codes, expected)


@pytest.mark.parametrize(("expert", "hot"), [(0, False), (E - 1, True)])
def test_a_move_that_fails_half_way(
    expert: int, hot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer computes nothing more: an expert would count twice, or never."""
    model = Hybrid(8, flags=True, deferred=0)

    def fail(*_: object) -> None:
        raise RuntimeError("cudaLaunchHostFunc failed")

    runner = model.runners[0]
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedStream, "host_function", fail)
        with pytest.raises(RuntimeError, match="cudaLaunchHostFunc"):
            runner.move(expert, hot, 0)
    for call in (
        lambda: runner.move(1, False, 0),
        lambda: runner.submit(*signature_batch(1, 0).args, 0),
    ):
        with pytest.raises(RuntimeError, match=f"move of expert {expert} failed half-way"):
            call()
