"""`HYBRID_MOE_DYNAMIC`: experts change places between the steps of SGLang's scheduler.

Before each batch of a scheduler process `OnlinePlacement` looks at what was routed, and swaps in
the order of the stream on which the next batch runs or is replayed. With several ranks each swaps
among the experts that it has on both sides: those are the first rank's, which has the CPU.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from hybrid_moe.integrations.sglang import contract, gpu_backend
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError
from hybrid_moe.integrations.sglang.step_faults import before
from hybrid_moe.placement.online import (
    OnlineOptions,
    OnlinePlacement,
    OnlineReport,
    prepare_loops,
)
from hybrid_moe.wrapper import KTMoEWrapper

logger = logging.getLogger(__name__)

VARIABLE = gpu_backend.DYNAMIC
"""Environment variable: 1, or how many bytes may move in a second, see `OnlineOptions.of`."""

REPORT_SECONDS = 60.0
"""Between lines of the log about what has moved."""

REQUIREMENTS = (
    contract.Requirement(
        "sglang.srt.managers.scheduler:Scheduler.run_batch",
        "the stream of a batch",
        contract.uses("enable_overlap", "forward_stream"),
    ),
)
"""What is relied on beside `contract.REQUIREMENTS`."""


def chosen(backend: str | None, environ: Mapping[str, str] = os.environ) -> OnlineOptions | None:
    """How experts move; None where they stay.

    Args:
        backend: who computes the experts on the GPU, see `gpu_backend.chosen`.

    Raises:
        ValueError: the variable's value.
        UnsupportedLayerError: SGLang has these experts, and they cannot move.
    """
    try:
        options = OnlineOptions.of(environ.get(VARIABLE))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error
    if options is not None and backend is None:
        raise UnsupportedLayerError(
            f"{VARIABLE} moves experts between slots of this package and the CPU, but SGLang has "
            f"the experts on the GPU: set {gpu_backend.VARIABLE} to one of "
            f"{', '.join(gpu_backend.BACKENDS)}, or leave {VARIABLE} out"
        )
    return options


class MovingExperts:
    """The layers of one scheduler process whose experts move."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[KTMoEWrapper] = weakref.WeakSet()
        self._options = OnlineOptions()
        self._online: OnlinePlacement | None = None
        self._told_at, self._told_swaps = -REPORT_SECONDS, 0

    def join(self, layer: KTMoEWrapper, options: OnlineOptions) -> None:
        """A layer that has been loaded."""
        if not self._layers:
            contract.check(REQUIREMENTS)
            _install()
            prepare_loops()  # while the model is loaded, not before its first step
        self._layers.add(layer)
        self._options, self._online = options, None

    def before_step(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Before `Scheduler.run_batch`."""
        if self._online is None:
            loaded = [layer for layer in self._layers if layer.loaded]
            self._online = OnlinePlacement(
                sorted(loaded, key=lambda layer: layer.layer_idx), self._options
            )
        self._online.step(_stream_of(scheduler))
        self._tell(self._online)

    def report(self) -> OnlineReport | None:
        """What has moved; None before the first step."""
        return None if self._online is None else self._online.report()

    def _tell(self, online: OnlinePlacement) -> None:
        """Log what has moved, now and then."""
        now = time.monotonic()
        if now - self._told_at < REPORT_SECONDS:
            return
        report, self._told_at = online.report(), now
        if report.swaps != self._told_swaps:
            self._told_swaps = report.swaps
            logger.info("%s: %s", VARIABLE, report.summary())


MOVING = MovingExperts()
"""Of this process."""


def _install() -> None:
    """Let SGLang's scheduler tell about its steps."""
    from sglang.srt.managers.scheduler import Scheduler

    before(Scheduler, "run_batch", MOVING.before_step)


def _stream_of(scheduler: Any) -> int | None:
    """Where the next batch will run: on a stream of its own if it overlaps with the scheduler."""
    if not torch.cuda.is_available():
        return None
    stream = scheduler.forward_stream if scheduler.enable_overlap else torch.cuda.current_stream()
    handle: int = stream.cuda_stream
    return handle
