"""The step: what the GPU, the link and the CPU do, layer after layer.

    GPU    | before L | beside L | sent L ......... wait | before L+1 | ...
    link   |          | copies of L |
    CPU               | submit | experts of L | deferred of L ..... | experts of L+1
    sum of L needs: the GPU's parts, the CPU's experts of L, what L-1 deferred

Each lane does one thing at a time, in the order of the layers. A layer's sum is complete when its
latest part is, and the next layer starts then: a step is one pass of sums and maxima.
Copies start when the routing is known, or `early`, where the experts of a layer are all but certain
(a long prompt meets nearly all): then as soon as the link and one of `buffers` places are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_moe.schedule.layer_times import LayerTimes

GPU, LINK, CPU = "GPU", "link", "CPU"


@dataclass(frozen=True)
class Span:
    """Something that a lane does: from `start` to `end`, in seconds of the step."""

    lane: str
    layer: int
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTimeline:
    """A step.

    Attributes:
        seconds: all of it.
        spans: what each lane did, in the order in which it was scheduled; nothing of length 0.
        ends: when the sum of each layer was complete, in seconds.
    """

    seconds: float
    spans: tuple[Span, ...]
    ends: tuple[float, ...]

    def busy(self, lane: str) -> float:
        """Seconds in which a lane worked."""
        return sum(span.end - span.start for span in self.spans if span.lane == lane)

    @property
    def idle(self) -> float:
        """Seconds in which the GPU waited for a layer's sum, or for copies."""
        return self.ends[-1] - self.busy(GPU)


def run_step(
    layers: Sequence[LayerTimes], *, after: float = 0.0, early: bool = False, buffers: int = 2
) -> StepTimeline:
    """One decode step, or one chunk of a prompt.

    Args:
        layers: parts of each layer, in order.
        after: seconds behind the last layer: output layer, choice of the token, the engine's loop.
        early: copies need not wait for the routing of their layer.
        buffers: layers whose sent experts find room at the same time; with `early` only.

    Raises:
        ValueError: no layer, fewer than one buffer, or the last layer with experts defers some.
    """
    if not layers or buffers < 1:
        raise ValueError(f"a step needs layers and buffers, not {len(layers)} and {buffers}")
    routed = [times for times in layers if times.routed]
    if routed and routed[-1].deferred:
        raise ValueError(
            f"layer {routed[-1].layer} defers experts, but no layer after it adds them"
        )
    spans: list[Span] = []
    now = cpu_free = link_free = 0.0
    carried = 0.0  # when the sum that the last layer with experts deferred is back
    ends: list[float] = []
    computed: list[float] = []  # by layer with copies: when the GPU was done with them

    for times in layers:
        known = _add(spans, GPU, times.layer, "before", now, times.before)
        if times.link:
            room = computed[-buffers] if len(computed) >= buffers else 0.0
            start = max(link_free, room if early else known)
            link_free = _add(spans, LINK, times.layer, "copies", start, times.link)
        gpu = _add(spans, GPU, times.layer, "beside", known, times.beside)
        arrived = link_free if times.link else 0.0
        gpu = _add(spans, GPU, times.layer, "sent", max(gpu, arrived), times.sent)
        if times.link:
            computed.append(gpu)
        now = gpu
        if times.routed:
            now, carried = max(now, carried), 0.0
        if times.cpu or times.deferred:
            start = max(known + times.submit, cpu_free)
            cpu_free = _add(spans, CPU, times.layer, "experts", start, times.cpu)
            if times.cpu:
                now = max(now, cpu_free + times.back)
            cpu_free = _add(spans, CPU, times.layer, "deferred", cpu_free, times.deferred)
            if times.deferred:
                carried = cpu_free + times.back
        ends.append(now)
    return StepTimeline(now + after, tuple(spans), tuple(ends))


def _add(
    spans: list[Span], lane: str, layer: int, what: str, start: float, seconds: float
) -> float:
    """Note a span, and say when it ends."""
    if seconds > 0:
        spans.append(Span(lane, layer, what, start, start + seconds))
    return start + seconds
