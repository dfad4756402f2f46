"""A GPU's streams in process: work is queued, and a seeded scheduler decides what happens next.

It keeps what CUDA promises and permutes the rest:

* the work of a stream runs in order; streams run in any order among each other, unless they share a
  hardware queue (`channels`), which runs in the order of submission;
* events; one host thread that makes all host functions' calls, one at a time;
* memory flags; work that the host does meanwhile (`agents`: workers, the thread that reads flags);
* capture: work of the captured stream and of streams that it forks becomes a graph of nodes with
  dependencies, and a replay runs them in any order that these allow. Streams that are not joined at
  the end, and events of other captures, are errors.

While a stream is entered, torch's operators on CPU tensors are queued on it: their results have
garbage in them until the stream has run, and an operator that needs a value at once is an error.
"""

from __future__ import annotations

import ctypes
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu")
SIDE_HANDLES = 1000
"""Handles of streams that are created without one begin here."""

DONE, ADVANCED, BLOCKED = "done", "advanced", "blocked"

Step = Callable[[], str]
"""Does some of a piece of work: DONE, ADVANCED, or BLOCKED if it could do nothing."""


class DeadlockError(AssertionError):
    """Nothing that is queued can ever run."""


class CaptureError(RuntimeError):
    """A capture that CUDA would refuse."""


@dataclass(eq=False)
class Event:
    """A point in a stream; in a capture, the nodes that come before it."""

    graph: Graph | None = None
    nodes: frozenset[Node] = frozenset()
    reached: bool = False
    at: int = 0  # how many things had happened when it was reached

    def reach(self, now: int) -> None:
        self.reached, self.at = True, now


@dataclass(eq=False)
class Node:
    """A piece of work in a graph. `make` gives a fresh step for each replay."""

    name: str
    make: Callable[[], Step]
    after: frozenset[Node]
    addresses: tuple[int, ...] = ()
    before: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        for other in self.after:
            other.before.append(self)


@dataclass(eq=False)
class Graph:
    """Captured work; `launch` queues a replay."""

    device: Device
    nodes: list[Node] = field(default_factory=list)
    open: bool = True

    def launch(self, stream: EmulatedStream) -> None:
        assert not self.open
        stream.push("replay", self._replay, self.addresses)

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a replay uses of the host's memory, besides tensors, which it keeps alive itself."""
        return tuple(address for node in self.nodes for address in node.addresses)

    def _replay(self) -> Step:
        steps = {node: node.make() for node in self.nodes}
        missing = {node: len(node.after) for node in self.nodes}
        ready = [node for node, count in missing.items() if count == 0]

        def step() -> str:
            self.device.rng.shuffle(ready)
            for node in ready:
                outcome = steps[node]()
                if outcome == ADVANCED:
                    return ADVANCED
                if outcome == DONE:
                    ready.remove(node)
                    for other in node.before:
                        missing[other] -= 1
                        if missing[other] == 0:
                            ready.append(other)
                    return ADVANCED if ready else DONE
            return BLOCKED if ready else DONE

        return step


class _QueuedOperators(TorchDispatchMode):
    """Queues torch's operators on the stream that is entered."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stream, schema = self._device.entered[-1], func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return func(*args, **kwargs)  # a view
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host waits for a value of the GPU")
        if schema.is_mutable:
            stream.queue(func.__name__, lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0])
        results = func(*args, **kwargs)  # for its shape

        def compute() -> None:
            for old, new in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                old.copy_(new)

        for result in tree_leaves(results):
            result.fill_(float("nan") if result.is_floating_point() else 0)
        stream.queue(func.__name__, compute)
        return results


class Device:
    """Streams, and all that goes on beside them.

    Args:
        rng: decides what happens next.
        channels: hardware queues that the streams share; None for one each.
        would_block: whether the host function (function, user_data) would wait now.
        has_flags: whether its streams have memory flags.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        channels: int | None = None,
        would_block: Callable[[int, int], bool] = lambda function, user_data: False,
        has_flags: bool = True,
    ) -> None:
        self.rng, self.channels, self.has_flags = rng, channels, has_flags
        self.would_block = would_block
        self.python: dict[int, Callable[[int], object]] = {}
        """Host functions of tests, by a number in place of their address."""
        self.agents: list[tuple[float, Callable[[], bool]]] = []
        """What else goes on: how likely it is to be next, and a step that says whether it did
        something."""
        self.entered: list[EmulatedStream] = []
        self.calling: object = None
        """The host function that has the callback thread."""
        self.allocated: list[weakref.ref[torch.Tensor]] = []
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.before_step: Callable[[], object] = lambda: None
        self._mode = _QueuedOperators(self)
        self._queues: dict[int, deque[tuple[str, Step, tuple[int, ...]]]] = {}
        self._streams = 0
        self.happened = 0

    def stream(self, handle: int | None = None) -> EmulatedStream:
        """A new stream."""
        self._streams += 1
        return EmulatedStream(self, handle if handle is not None else SIDE_HANDLES + self._streams)

    def queue_of(self, handle: int) -> deque[tuple[str, Step, tuple[int, ...]]]:
        channel = handle if self.channels is None else handle % self.channels
        return self._queues.setdefault(channel, deque())

    def addresses(self) -> Iterator[int]:
        """What queued work and graphs may use of the host's memory, besides tensors."""
        for queue in self._queues.values():
            for _, _, addresses in queue:
                yield from addresses
        for graph in self.graphs:
            yield from graph.addresses

    def enter(self, stream: EmulatedStream) -> None:
        self.entered.append(stream)
        if len(self.entered) == 1:
            self._mode.__enter__()

    def leave(self) -> None:
        self.entered.pop()
        if not self.entered:
            self._mode.__exit__(None, None, None)

    def step(self) -> bool:
        """Let one thing happen, if anything can."""
        self.before_step()
        self.happened += 1
        choices: list[tuple[float, Callable[[], bool]]] = [
            (1.0, lambda queue=queue: self._advance(queue))  # type: ignore[misc]
            for queue in self._queues.values()
            if queue
        ]
        choices += self.agents
        choices.sort(key=lambda choice: self.rng.random() ** (1 / choice[0]), reverse=True)
        return any(act() for _, act in choices)

    @staticmethod
    def _advance(queue: deque[tuple[str, Step, tuple[int, ...]]]) -> bool:
        outcome = queue[0][1]()
        if outcome == DONE:
            queue.popleft()
        return outcome != BLOCKED

    def run_some(self, steps: int) -> None:
        """Let up to `steps` things happen."""
        for _ in range(steps):
            if not self.step():
                return

    def run(self) -> None:
        """Until all is done.

        Raises:
            DeadlockError: something is left that cannot run.
        """
        while self.step():
            pass
        left = {key: [name for name, *_ in queue] for key, queue in self._queues.items() if queue}
        if left:
            raise DeadlockError(f"nothing can run any more, but queued is {left}")

    @contextmanager
    def capture(self, stream: EmulatedStream) -> Iterator[Graph]:
        """Capture a graph from `stream`."""
        graph = Graph(self)
        self.graphs.add(graph)
        stream.join(graph, frozenset())
        yield graph
        graph.open = False
        loose = set(graph.nodes) - _ancestors(stream.tail)
        stream.leave_capture()
        if loose:
            raise CaptureError(f"not joined: {sorted(node.name for node in loose)}")


def _ancestors(nodes: frozenset[Node]) -> set[Node]:
    found, left = set(), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.after
    return found


class EmulatedStream:
    """See `hybrid_moe.streams.interface.Stream`."""

    def __init__(self, device: Device, handle: int) -> None:
        self.gpu, self.handle = device, handle
        self.device = DEVICE
        self.tail: frozenset[Node] = frozenset()
        self._graph: Graph | None = None
        self._side: EmulatedStream | None = None

    def __enter__(self) -> None:
        self.gpu.enter(self)

    def __exit__(self, *error: object) -> None:
        self.gpu.leave()

    @property
    def side(self) -> EmulatedStream:
        if self._side is None:
            self._side = self.gpu.stream()
        return self._side

    @property
    def has_flags(self) -> bool:
        return self.gpu.has_flags

    # capture

    @property
    def graph(self) -> Graph | None:
        """The open graph that this stream's work goes to."""
        if self._graph is not None and not self._graph.open:
            self.leave_capture()
        return self._graph

    def join(self, graph: Graph, after: frozenset[Node]) -> None:
        self._graph, self.tail = graph, self.tail | after

    def leave_capture(self) -> None:
        self._graph, self.tail = None, frozenset()

    def capturing(self) -> bool:
        return self.graph is not None

    # work

    def push(self, name: str, make: Callable[[], Step], addresses: tuple[int, ...] = ()) -> None:
        """Queue a piece of work that uses `addresses`, or add it to the graph."""
        graph = self.graph
        if graph is None:
            self.gpu.queue_of(self.handle).append((name, make(), addresses))
        else:
            node = Node(name, make, self.tail, addresses)
            graph.nodes.append(node)
            self.tail = frozenset({node})

    def queue(self, name: str, work: Callable[[], object], addresses: tuple[int, ...] = ()) -> None:
        """Queue work that never waits."""

        def step() -> str:
            work()
            return DONE

        self.push(name, lambda: step, addresses)

    def record(self, *, timed: bool = False) -> Event:
        graph = self.graph
        if graph is not None:
            assert not timed
            return Event(graph, self.tail)
        event = Event()
        self.queue("record", lambda: event.reach(self.gpu.happened))
        return event

    def passed(self, event: Event) -> bool:
        return event.reached

    def seconds_between(self, begin: Event, end: Event) -> float:
        assert begin.reached and end.reached
        return (end.at - begin.at) * 1e-6

    def host_wait(self, event: Event) -> None:
        with _disable_current_modes():
            while not event.reached:
                if not self.gpu.step():
                    raise DeadlockError("the host waits for what can never run")

    def wait(self, event: Event) -> None:
        graph = self.graph
        if graph is not event.graph and (graph is not None or not event.graph.open):
            raise CaptureError("an event of one capture cannot be waited for elsewhere")
        if event.graph is not None:
            self.join(event.graph, event.nodes)
        else:
            self.push("wait event", lambda: lambda: DONE if event.reached else BLOCKED)

    def host_function(self, function: int, user_data: int) -> None:
        gpu = self.gpu

        def make() -> Step:
            me = object()

            def step() -> str:
                if gpu.calling is None:
                    gpu.calling = me
                    return ADVANCED
                if gpu.calling is not me or gpu.would_block(function, user_data):
                    return BLOCKED
                python = gpu.python.get(function)
                if python is not None:
                    python(user_data)
                else:
                    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(user_data)
                gpu.calling = None
                return DONE

            return step

        self.push("host function", make, (user_data,))

    def write_value(self, address: int, value: int) -> None:
        word = ctypes.c_int64.from_address(address)
        self.queue("write value", lambda: setattr(word, "value", value), (address, value))

    def wait_value(self, address: int, value: int) -> None:
        word = ctypes.c_int64.from_address(address)
        self.push(
            "wait value", lambda: lambda: DONE if word.value == value else BLOCKED, (address,)
        )

    # memory

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with _disable_current_modes():  # the host's memory, now; NumPy's, which tests can watch
            room = np.zeros(max(1, math.prod(shape)) * dtype.itemsize, np.uint8)
            tensor = torch.from_numpy(room)[: math.prod(shape) * dtype.itemsize]
            tensor = tensor.view(dtype).reshape(shape)
        self.gpu.allocated.append(weakref.ref(tensor))
        return tensor

    def to_host(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.gpu.entered[-1] is self
        target.copy_(source.to(target.dtype).contiguous(), non_blocking=True)

    def to_device(self, source: torch.Tensor) -> torch.Tensor:
        assert self.gpu.entered[-1] is self
        return torch.empty(source.shape, dtype=source.dtype).copy_(source, non_blocking=True)

    def add(self, target: torch.Tensor, other: torch.Tensor) -> None:
        with self:
            target.add_(other)
