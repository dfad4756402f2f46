"""What the expert layers of this process have done so far: plain counters, that only grow.

Compiled code adds to a layer's own words at each launch (`drivers.route`) and when a job ends
(`drivers.worker`): also where a graph's replay launches it and no Python runs. Python adds what it
does itself to `TOTALS`. A layer that is gone leaves its counts here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.locks import ProcessLock


class LayerUse(NamedTuple):
    """What an expert layer has done. Sums over all calls.

    Attributes:
        launches: jobs; a call with many tokens is several.
        tokens: of them.
        hot_pairs: pairs of token and expert that the mask put on the GPU.
        cold_pairs: pairs that were computed on the CPU.
        read_bytes: of experts that were read, each once a job.
        busy_ns: nanoseconds in which the pool was at its jobs.
    """

    launches: int = 0
    tokens: int = 0
    hot_pairs: int = 0
    cold_pairs: int = 0
    read_bytes: int = 0
    busy_ns: int = 0

    def plus(self, other: LayerUse) -> LayerUse:
        """The sum of both."""
        return LayerUse(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass
class Totals:
    """What Python counts for the process.

    Attributes:
        hot_pairs: pairs of jobs in which the CPU had no part.
        waits: times that a caller waited for a job on CPU tensors, working on it meanwhile.
        waited_ns: how long.
        promotions, demotions: experts that moved to a GPU, and back.
        moved_bytes: of them.
        sent_experts, sent_bytes: that travelled to a GPU for one batch.
        stays: experts that came for a batch and took a place that lasts.
        deferred_pairs: pairs that the decision about a batch put off until the next layer.
        ignored_ids: ids out of range.
    """

    hot_pairs: int = 0
    waits: int = 0
    waited_ns: int = 0
    promotions: int = 0
    demotions: int = 0
    moved_bytes: int = 0
    sent_experts: int = 0
    sent_bytes: int = 0
    stays: int = 0
    deferred_pairs: int = 0
    ignored_ids: int = 0


TOTALS = Totals()
"""Of the process. Threads add without a lock: two at once may lose one of two counts."""

_layers: dict[int, tuple[str, int, records.Layer]] = {}
_gone: dict[str, LayerUse] = {}
_lock = ProcessLock()
_next = 0


def watch_layer(name: str, expert_bytes: int, layer: records.Layer, lives: object) -> None:
    """Count a layer from now on.

    Args:
        name: what it is called; layers of one name are counted together.
        expert_bytes: of one of its experts, over all pools.
        layer: its descriptor.
        lives: an object that lives as long as jobs of the layer may run.
    """
    global _next
    with _lock:
        key = _next = _next + 1
        _layers[key] = name, expert_bytes, layer
    weakref.finalize(lives, _retire, key).atexit = False


def _retire(key: int) -> None:
    """A layer is gone. A finalizer may run within any allocation of the thread that holds the lock,
    so this takes none: a dict does one step at a time."""
    name, expert_bytes, layer = _layers.pop(key)
    _gone[name] = _gone.get(name, LayerUse()).plus(_use_of(expert_bytes, layer))


def _use_of(expert_bytes: int, layer: records.Layer) -> LayerUse:
    return LayerUse(
        layer.launches.value,
        layer.tokens.value,
        layer.hot.value,
        layer.cold.value,
        layer.read_experts.value * expert_bytes,
        layer.busy_ns.value,
    )


def use_by_layer() -> dict[str, LayerUse]:
    """What the layers of each name have done so far, those included that are gone."""
    found = dict(_gone)
    for name, expert_bytes, layer in list(_layers.values()):
        found[name] = found.get(name, LayerUse()).plus(_use_of(expert_bytes, layer))
    return found
