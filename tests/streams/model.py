"""A small model on emulated streams: the project's own staging, compiled hand-over and kernels.

Only the GPU and the threads are emulated. The workers and the thread that reads mailboxes are
steps that the scheduler takes in its own time: `help_until` ends the oldest job, `watch_once` looks
at all mailboxes.
"""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.records import RING, GraphJob, Job, Mailbox
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.streams.watcher import Watcher
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred
from hybrid_moe.runtime.runner import LayerRunner
from hybrid_moe.streams.buffers import BufferPool, Mailboxes
from hybrid_moe.streams.staging import Stager
from tests.hybrid_moe.members import Layer
from tests.streams.emulation import Device, EmulatedStream, Graph

E, K, H, I = 4, 2, 32, 32
INDICES = (0, 1, 3)
"""Of the MoE layers: layer 2 is dense."""


class ManualGroup(PoolGroup):
    """A group without threads: jobs run when `work` is called."""

    def __init__(self) -> None:
        super().__init__(PoolConfig(1))
        self.caller_works = False

    def start_background_worker(self) -> None:
        pass

    def work(self) -> bool:
        """End the oldest job; whether there was one."""
        completed = self.control.completed.value
        if self.control.submitted.value == completed:
            return False
        while self._help_until(self.address, completed + 1, 0, 0, 1) == 0:
            continue  # it gives up after some time, for the sake of Ctrl-C
        return True

    def addresses(self) -> Iterator[int]:
        """What jobs that are not complete point at."""
        group = self.control
        for sequence in range(group.completed.value + 1, group.submitted.value + 1):
            job = group.ring[sequence % RING].job
            yield from (ctypes.c_int64 * (Job.nbytes // 8)).from_address(job.address)

    def would_block(self, function: int, user_data: int) -> bool:
        """Whether a host function would wait: for its job, or for room."""
        completed = self.control.completed.value
        if function == drivers.addresses()["wait_host"]:
            return completed < GraphJob.at(user_data).sequence.value
        return self.control.submitted.value + 1 >= completed + RING


class ManualWatcher(Watcher):
    """A watcher without a thread."""

    def __init__(self) -> None:
        super().__init__()
        self._once = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(
            drivers.addresses()["watch_once"]
        )

    def _seen(self) -> list[bytes]:
        """Its posts, and the mailboxes."""
        posts = [self.control.posts[i] for i in range(self.control.count.value)]
        pieces = [(post.address, post.nbytes) for post in posts]
        pieces += [(post.mailbox.value, Mailbox.nbytes) for post in posts]
        return [ctypes.string_at(*piece) for piece in pieces]

    def addresses(self) -> Iterator[int]:
        """Mailboxes, and graph jobs under way."""
        for i in range(self.control.count.value):
            post = self.control.posts[i]
            yield from (post.mailbox.value, post.graph_job.address)

    def look(self) -> bool:
        """Look once; whether that changed anything."""
        before = self._seen()
        self._once(self.address)
        return self._seen() != before


def make_layers() -> tuple[ManualGroup, list[ExpertLayer]]:
    """Layers with random experts, always the same, and the workers that they share."""
    rng, group, made = np.random.default_rng(0), ManualGroup(), []
    for _ in INDICES:
        layer = ExpertLayer(MXFP4, E, H, I, pool=group.config)
        layer._group = group
        layer.allocate(np.ones(E, bool))
        for expert in range(E):
            matrices = (
                Matrix(*MXFP4.encode(rng.standard_normal(shape).astype(np.float32)))
                for shape in ((I, H), (I, H), (H, I))
            )
            layer.load(expert, ExpertTensors(*matrices))
        made.append(layer)
    return group, made


@functools.lru_cache(maxsize=1)
def layers() -> tuple[ManualGroup, list[ExpertLayer]]:
    """Those of all models that bring none of their own."""
    return make_layers()


@dataclass(frozen=True)
class Inputs:
    """hidden bf16 [T, H], ids int64 [T, K] (some are nobody's), weights float32 [T, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def random(tokens: int, seed: int) -> Inputs:
        rng = torch.Generator().manual_seed(seed)
        return Inputs(
            torch.randn(tokens, H, generator=rng).to(torch.bfloat16),
            torch.randint(-1, E, (tokens, K), generator=rng),
            torch.rand(tokens, K, generator=rng) + 0.1,
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights

    def empty(self) -> Inputs:
        """Tensors of the same shapes, full of garbage."""
        return Inputs(
            torch.full_like(self.hidden, float("nan")),
            torch.full_like(self.ids, E + 7),
            torch.full_like(self.weights, float("nan")),
        )


@functools.lru_cache(maxsize=4096)
def part(
    layer: int, tokens: int, seed: int, mask: tuple[bool, ...], which: str, deferred: int
) -> Any:
    """What the experts of one job compute: all of them, those that run now, or those later."""
    group, made = layers()
    batch = Inputs.random(tokens, seed)
    ids = batch.ids
    if which != "all":
        now, later = split_deferred(ids, batch.weights, K - deferred, E)
        ids = now if which == "now" else later
    job = made[layer].submit(
        batch.hidden.view(torch.int16).numpy().view(np.uint16),
        ids.numpy(),
        batch.weights.numpy(),
        np.array(mask),
    )
    while group.work():
        pass
    return torch.from_numpy(job.wait().view(np.int16)).view(torch.bfloat16)


@dataclass
class Check:
    """A result [T, H], and what it must be once the streams have run."""

    what: str
    got: torch.Tensor
    expected: Callable[[], torch.Tensor]


@dataclass
class Captured:
    """A step as graphs that are replayed one after the other, its inputs and outputs by layer."""

    graphs: list[Graph]
    tokens: int
    inputs: list[Inputs]
    outputs: list[torch.Tensor]


class Model:
    """Layers of a model that run steps on emulated streams.

    Args:
        seed: of the scheduler.
        flags: whether jobs are handed over by flags.
        channels: hardware queues.
        deferred: experts per token that may come one layer later.
        count: layers.
        haste: how likely workers and watcher are to be next, compared with a stream.
        own: layers that nobody else has, of `make_layers`.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        flags: bool = True,
        channels: int | None = None,
        deferred: int = 0,
        count: int = len(INDICES),
        haste: tuple[float, float] = (1.0, 1.0),
        own: tuple[ManualGroup, list[ExpertLayer]] | None = None,
    ) -> None:
        self.group, made = own or layers()
        self.rng = random.Random(seed)
        self.gpu = Device(
            self.rng, channels=channels, would_block=self.group.would_block, has_flags=flags
        )
        self.watcher = ManualWatcher()
        self.gpu.agents = [(haste[0], self.group.work), (haste[1], self.watcher.look)]
        self.pool = BufferPool(Mailboxes(lambda: self.watcher))
        self.mask = torch.from_numpy(np.zeros(E, np.bool_))
        self.deferred, self.streams = deferred, [self.gpu.stream(0), self.gpu.stream(1)]
        self._stream = self.streams[0]
        self.checks: list[Check] = []
        self.runners: list[LayerRunner] = []
        chain = DeferralChain()
        shapes = [LayerShape(index, E, K, H, I) for index in INDICES[:count]]
        self._members = [Layer(shape.layer_idx, hidden_size=H) for shape in shapes]
        for shape, layer in zip(shapes, made, strict=False):
            chain.join(self._members[len(self.runners)])
            runner: Any = LayerRunner(
                layer,
                shape,
                self.mask,
                np.ones(E, bool),
                chain,
                deferred=deferred if shape is not shapes[-1] else 0,
                strict=False,
            )
            runner._stager = Stager(layer, self.mask, self.pool)
            runner._stream = lambda device, handle: self._stream
            self.runners.append(runner)
        self.masked: tuple[bool, ...] = (False,) * E

    def addresses(self) -> Iterator[int]:
        """What streams, graphs, the watcher and workers may use."""
        yield from self.gpu.addresses()
        yield from self.watcher.addresses()
        yield from self.group.addresses()

    def on(self, stream: EmulatedStream) -> None:
        """Calls go to `stream` from now on."""
        self._stream = stream

    def fill(self, stream: EmulatedStream, given: Inputs, values: Inputs) -> None:
        """Queue: the GPU computes the inputs."""
        with stream:
            for target, source in zip(given.tensors, values.tensors, strict=True):
                target.copy_(source)

    def clobber(self, stream: EmulatedStream, given: Inputs) -> None:
        """Queue: the GPU uses the inputs' memory for something else."""
        with stream:
            given.hidden.fill_(float("nan"))
            given.ids.fill_(E + 9)
            given.weights.fill_(float("nan"))

    def forward(
        self, at: int, given: Inputs, stream: EmulatedStream, collector: EmulatedStream
    ) -> torch.Tensor:
        """One layer: submitted on one stream, collected on another or the same."""
        self.on(stream)
        self.runners[at].submit(*given.tensors, 1)
        self.clobber(stream, given)
        if not stream.capturing():
            self.gpu.run_some(self.rng.randrange(12))
        self.on(collector)
        return self.runners[at].sync(given.hidden, 1)

    def expect(self, at: int, tokens: int, seed: int) -> Callable[[], torch.Tensor]:
        """What layer `at` gives when each layer gets the batch of `seed + its place`."""
        mask, deferred = self.masked, self.deferred
        defers = deferred > 0 and at < len(self.runners) - 1

        def compute() -> torch.Tensor:
            own = part(at, tokens, seed + at, mask, "now" if defers else "all", deferred)
            if deferred == 0 or at == 0:
                return own
            return own + part(at - 1, tokens, seed + at - 1, mask, "later", deferred)

        return compute

    def step(self, tokens: int, seed: int, stream: int = 0, collector: int | None = None) -> None:
        """An eager step through all layers."""
        on = self.streams[stream]
        collect = on if collector is None else self.streams[collector]
        for at in range(len(self.runners)):
            values = Inputs.random(tokens, seed + at)
            given = values.empty()
            self.fill(on, given, values)
            got = self.forward(at, given, on, collect)
            self.checks.append(Check(f"eager, layer {at}", got, self.expect(at, tokens, seed)))

    def capture(self, tokens: int, pieces: bool = False, stream: int = 0) -> Captured:
        """A captured step; like torch, with all streams at rest.

        Args:
            pieces: one graph for each layer, as breakable graphs have it, instead of one for all.
        """
        self.gpu.run()
        on = self.streams[stream]
        inputs = [Inputs.random(tokens, 0).empty() for _ in self.runners]
        graphs, outputs = [], []
        for places in [[at] for at in range(len(inputs))] if pieces else [range(len(inputs))]:
            with self.gpu.capture(on) as graph:
                outputs += [self.forward(at, inputs[at], on, on) for at in places]
            graphs.append(graph)
        return Captured(graphs, tokens, inputs, outputs)

    def replay(self, captured: Captured, seed: int, stream: int = 0) -> None:
        """Queue new inputs, the graph, and a look at its outputs."""
        on = self.streams[stream]
        for at, given in enumerate(captured.inputs):
            self.fill(on, given, Inputs.random(captured.tokens, seed + at))
        for graph in captured.graphs:
            graph.launch(on)
        for at, output in enumerate(captured.outputs):
            with on:
                got = output.clone()
            expected = self.expect(at, captured.tokens, seed)
            self.checks.append(Check(f"replay, layer {at}", got, expected))

    def set_mask(self, mask: tuple[bool, ...], stream: int = 0) -> None:
        """Queue a change of the mask, in the order of the stream."""
        self.masked = mask
        values = torch.tensor(mask)
        with self.streams[stream]:
            self.mask.copy_(values)

    def verify(self) -> None:
        """Run everything; all results are right, bit for bit, and nothing is left behind."""
        self.gpu.run()
        for check in self.checks:
            torch.testing.assert_close(
                check.got, check.expected(), rtol=0, atol=0, msg=lambda m, c=check: f"{c.what}: {m}"
            )
        for page in (ref() for ref in self.gpu.allocated):
            if (
                page is not None
                and page.shape[-1] == Mailbox.nbytes // 8
                and page.dtype == torch.int64
            ):
                assert not page.any(), "a flag is left"
        for runner in self.runners:
            assert runner.take_error() is None
