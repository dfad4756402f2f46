"""Faults of jobs that the host did not wait for: what a server asks after every step.

A graph replay runs no Python, so nothing can be raised where a worker fails. The job's output is
NaN and a word of the process grows; `check_errors`, called after the step's results have arrived,
raises the exception for the batch that it belongs to. The next batch starts clean.
"""

from __future__ import annotations

import weakref

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.streams.graph_job import closed_runs, faults
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.locks import ProcessLock


class LayerFaults:
    """What goes wrong in one layer, and how that is said.

    Args:
        layer: its graph jobs are asked for what their runs have met.
        layer_idx: index of the layer in the model.
        strict: ids out of range are an error.

    Attributes:
        ignored_ids: ids out of range in all calls so far.
    """

    def __init__(self, layer: ExpertLayer, layer_idx: int, *, strict: bool) -> None:
        self._layer, self._strict = layer, strict
        self.layer_idx = layer_idx
        self.ignored_ids = 0
        with _lock:
            _layers.add(self)

    def count(self, ignored: int, missing: int) -> Exception | None:
        """Count the ids that a batch ignored; what its sync must raise, if anything.

        Args:
            missing: an expert that a token is routed to and that is nowhere, or -1.
        """
        self.ignored_ids += ignored
        TOTALS.ignored_ids += ignored
        if ignored and self._strict:
            return self._out_of_range(ignored)
        return None if missing < 0 else self.not_loaded(missing)

    def take(self) -> Exception | None:
        """What workers have met in runs that have ended since the last call and that the host did
        not wait for; never waits."""
        report = self._layer.report()
        self.ignored_ids += report.ignored
        TOTALS.ignored_ids += report.ignored
        if report.error is not None:
            return RuntimeError(f"layer {self.layer_idx}: {report.error}")
        if report.missing:
            return self.not_loaded(report.missing_expert)
        return self._out_of_range(report.ignored) if report.ignored and self._strict else None

    def not_loaded(self, expert: int) -> RuntimeError:
        """A token is routed to an expert that is nowhere."""
        return RuntimeError(
            f"layer {self.layer_idx}: tokens are routed to expert {expert}, which "
            "gpu_experts_mask no longer puts on the GPU and which was not loaded: the mask was "
            "True for it when the weights were loaded"
        )

    def _out_of_range(self, count: int) -> IndexError:
        return IndexError(
            f"layer {self.layer_idx}: {count} of the ids in topk_ids are outside "
            f"0..{self._layer.num_experts - 1} (strict=True)"
        )


_layers: weakref.WeakSet[LayerFaults] = weakref.WeakSet()
_lock = ProcessLock()
_checked = 0
_closed = 0


def check_errors() -> None:
    """Raise what workers have met on CUDA tensors since the last check, in any layer.

    To be called when a step's results have arrived on the host: after a graph replay and the copy
    of its tokens, say. Costs one comparison where all is well, and never waits.

    Raises:
        RuntimeError: workers failed or made no progress, or tokens were routed to an expert that is
            neither on the GPU nor loaded, or a graph was replayed whose layer is gone. IndexError:
            `strict` layers met ids out of range. The message begins with the first layer; the
            outputs of the failed runs are NaN (of ids out of range: without them).
    """
    global _checked, _closed
    count = faults()
    if count == _checked:
        return
    with _lock:
        runs = closed_runs()  # once: streams add to it at any moment
        _checked, closed, _closed = count, runs - _closed, runs
        layers = sorted(_layers, key=lambda layer: layer.layer_idx)
    errors = [error for layer in layers if (error := layer.take()) is not None]
    if closed > 0:
        errors.append(
            RuntimeError(
                "a CUDA graph was replayed after a layer that it runs had been closed or dropped: "
                "its output is NaN"
            )
        )
    if len(errors) > 1:
        raise type(errors[0])(f"{errors[0]} (and {len(errors) - 1} more layers failed)")
    if errors:
        raise errors[0]
