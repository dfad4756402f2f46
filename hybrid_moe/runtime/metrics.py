"""`hybrid_moe.metrics()`: what this process's experts have done so far, also for Prometheus.

Asking costs some microseconds a layer and stops nobody. All figures are sums since the process
began; the difference of two (`after - before`) is what happened in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from hybrid_moe.cpu_kernels.streams.graph_job import faults
from hybrid_moe.cpu_kernels.use_counts import TOTALS, LayerUse, use_by_layer

PREFIX = "hybrid_moe_"
"""Of every name that Prometheus gets."""


class Sample(NamedTuple):
    """One number for Prometheus, a counter.

    Attributes:
        name: without the prefix. help: what it counts.
        label: (name, value) of its only label, or None.
        value: the count.
    """

    name: str
    help: str
    label: tuple[str, str] | None
    value: float


@dataclass(frozen=True)
class Metrics:
    """Counts of one process. Under SGLang that is a scheduler, one for each rank.

    Attributes:
        layers: name -> what the CPU's half of each expert layer has done.
        hot_pairs_alone: pairs of token and expert of layers that have no expert on the CPU.
        waits, waited_seconds: of callers for jobs on CPU tensors, linear layers' included; they
            work meanwhile. How long a GPU waits nobody counts: a trace shows it (docs/step.md).
        promotions, demotions, moved_bytes: experts that moved to a GPU, and back.
        ignored_ids: ids out of range. Of CUDA tensors they are counted when the step's results are
            taken (`check_errors`, or the next call of the layer).
        faults: runs of CUDA tensors' jobs that went wrong, and runs of `strict` layers with ids out
            of range.
        sent_experts, sent_bytes: that travelled to a GPU for one batch.
        stays: experts that came for a batch and took a place that lasts; promotions too.
        deferred_pairs: pairs of token and expert that the decision about a batch put off until the
            next layer. A depth that is given, as in graphs, is not counted.
    """

    layers: Mapping[str, LayerUse]
    hot_pairs_alone: int
    waits: int
    waited_seconds: float
    promotions: int
    demotions: int
    moved_bytes: int
    ignored_ids: int
    faults: int
    sent_experts: int = 0
    sent_bytes: int = 0
    stays: int = 0
    deferred_pairs: int = 0

    @property
    def total(self) -> LayerUse:
        """The sum over layers."""
        total = LayerUse()
        for use in self.layers.values():
            total = total.plus(use)
        return total

    @property
    def tokens(self) -> int:
        """Tokens of the layer that has computed most: of one model, the tokens that it has read."""
        return max((use.tokens for use in self.layers.values()), default=0)

    @property
    def cold_pairs(self) -> int:
        """Pairs of token and expert that the CPU has computed."""
        return self.total.cold_pairs

    @property
    def hot_pairs(self) -> int:
        """Pairs that belonged to a GPU's experts."""
        return self.total.hot_pairs + self.hot_pairs_alone

    @property
    def hit_rate(self) -> float | None:
        """Share of all pairs that were hot; None before the first one."""
        pairs = self.hot_pairs + self.cold_pairs
        return self.hot_pairs / pairs if pairs else None

    @property
    def read_bytes(self) -> int:
        """Of experts that the CPU read, each once a job however many tokens used it."""
        return self.total.read_bytes

    @property
    def busy_seconds(self) -> float:
        """In which the CPU's workers were at the experts."""
        return self.total.busy_ns / 1e9

    @property
    def bandwidth(self) -> float | None:
        """Bytes of experts per second of that time; None where there was none."""
        return self.read_bytes / self.busy_seconds if self.busy_seconds else None

    def bandwidth_share(self, ceiling: float) -> float | None:
        """`bandwidth` over what the memory gives.

        Args:
            ceiling: bytes per second that these threads read at most, as `hybrid-moe bench
                ceilings` measures.

        Decode is bound by this. A prefill reads an expert once for many tokens, and has a small
        share while it computes at its peak.
        """
        if not ceiling > 0:
            raise ValueError(f"ceiling is {ceiling}, must be bytes per second")
        return None if self.bandwidth is None else self.bandwidth / ceiling

    def __sub__(self, before: Metrics) -> Metrics:
        """What has come since."""
        layers = {}
        for name, use in self.layers.items():
            then = before.layers.get(name, LayerUse())
            layers[name] = LayerUse(*(now - was for now, was in zip(use, then, strict=True)))
        others = {
            field.name: getattr(self, field.name) - getattr(before, field.name)
            for field in fields(self)
            if field.name != "layers"
        }
        return Metrics(layers, **others)

    def samples(self) -> Iterator[Sample]:
        """Every count, for Prometheus."""
        for name, what, per_layer in (
            ("jobs_total", "jobs of the CPU's experts", "launches"),
            ("layer_tokens_total", "tokens of a layer's jobs", "tokens"),
            ("cold_pairs_total", "pairs of token and expert on the CPU", "cold_pairs"),
            ("hot_pairs_total", "pairs of token and expert on a GPU", "hot_pairs"),
            ("read_bytes_total", "bytes of experts that the CPU read", "read_bytes"),
        ):
            for layer, use in self.layers.items():
                yield Sample(name, what, ("layer", layer), getattr(use, per_layer))
        for layer, use in self.layers.items():
            what = "seconds in which the CPU was at a layer's experts"
            yield Sample("busy_seconds_total", what, ("layer", layer), use.busy_ns / 1e9)
        for name, what, value in (
            ("hot_pairs_alone_total", "pairs of layers without an expert on the CPU",
             self.hot_pairs_alone),
            ("waits_total", "waits of callers for jobs", self.waits),
            ("waited_seconds_total", "seconds of these waits", self.waited_seconds),
            ("promotions_total", "experts that moved to a GPU", self.promotions),
            ("demotions_total", "experts that moved back", self.demotions),
            ("moved_bytes_total", "bytes of experts that moved", self.moved_bytes),
            ("sent_experts_total", "experts sent for a batch", self.sent_experts),
            ("sent_bytes_total", "bytes of experts sent for a batch", self.sent_bytes),
            ("stays_total", "experts that came for a batch and stayed", self.stays),
            ("deferred_pairs_total", "pairs that were decided to be put off", self.deferred_pairs),
            ("ignored_ids_total", "ids out of range", self.ignored_ids),
            ("faults_total", "runs that went wrong", self.faults),
        ):  # fmt: skip
            yield Sample(name, what, None, value)

    def prometheus(self) -> str:
        """The counts in Prometheus's text format, version 0.0.4."""
        lines, seen = [], ""
        for sample in self.samples():
            name = f"{PREFIX}{sample.name}"
            if name != seen:
                lines += [f"# HELP {name} {sample.help}", f"# TYPE {name} counter"]
                seen = name
            label = (
                ""
                if sample.label is None
                else f'{{{sample.label[0]}="{_quoted(sample.label[1])}"}}'
            )
            lines.append(f"{name}{label} {sample.value:.15g}")
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def metrics() -> Metrics:
    """What the experts of this process have done so far."""
    totals = TOTALS
    return Metrics(
        layers=use_by_layer(),
        hot_pairs_alone=totals.hot_pairs,
        waits=totals.waits,
        waited_seconds=totals.waited_ns / 1e9,
        promotions=totals.promotions,
        demotions=totals.demotions,
        moved_bytes=totals.moved_bytes,
        sent_experts=totals.sent_experts,
        sent_bytes=totals.sent_bytes,
        stays=totals.stays,
        deferred_pairs=totals.deferred_pairs,
        ignored_ids=totals.ignored_ids,
        faults=faults(),
    )
