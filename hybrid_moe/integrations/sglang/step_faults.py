"""A worker's fault fails the requests of its step, with its message; the server goes on.

An exception inside a forward pass ends SGLang's scheduler, and a graph replay raises none: its
output is NaN. So a fault is kept until the step's results are about to be processed, and then the
step's requests are ended by SGLang's own means (`discard_output_reason`): their output is dropped
and their KV cache, which may hold NaN, never becomes another request's prefix.

Schedulers of tensor parallel ranks decide alike without talking, and only rank 0 would know of a
fault. There it still ends the server.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from hybrid_moe.integrations.sglang import gpu_backend
from hybrid_moe.integrations.sglang.gpu_faults import GpuLostError, explaining
from hybrid_moe.streams.faults import check_errors

logger = logging.getLogger(__name__)


class StepFaults:
    """The faults of one scheduler process.

    Attributes:
        alone: a scheduler runs the steps, and it is its model's only rank.
    """

    def __init__(self, check: Callable[[], None] = check_errors) -> None:
        self.alone = False
        self._check = check
        self._kept: Exception | None = None
        self._told: Exception | None = None
        self._failing_until = -1

    def keep(self, error: Exception) -> None:
        """Keep what a forward pass met; raises it where nothing could be done about it."""
        if not self.alone or isinstance(error, GpuLostError):
            raise error
        self._kept = self._kept or error

    def before_step(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Before `Scheduler.run_batch`."""
        from sglang.srt.runtime_context import get_parallel

        self.alone = get_parallel().tp_size == 1

    def before_results(self, scheduler: Any, batch: Any, result: Any) -> None:
        """Before `Scheduler.process_batch_result`: end the requests of steps with a fault.

        Later steps may be under way already, on the same requests or on others, and nobody knows
        which of them met the fault: all of them fail.
        """
        copied = getattr(result, "copy_done", None)
        if copied is not None:
            with explaining(gpu_backend.chosen(), "a step"):  # faults of replayed graphs come here
                copied.synchronize()
        error = self._take()
        if error is not None:
            self._told, self._failing_until = error, scheduler.forward_ct
            logger.error("a step of hybrid_moe's experts failed: %s", error)
        if self._told is not None and (batch.forward_iter or 0) <= self._failing_until:
            for request in batch.reqs:
                end(request, f"hybrid_moe: {self._told}")

    def _take(self) -> Exception | None:
        """The fault since the last results, if any."""
        kept, self._kept = self._kept, None
        try:
            self._check()
        except (RuntimeError, IndexError) as error:
            if not self.alone:
                raise
            return kept or error
        return kept


def end(request: Any, message: str) -> None:
    """Let SGLang drop what the request's step gave, and answer with an error."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    request.discard_output_reason = FINISH_ABORT(
        message, status_code=HTTPStatus.INTERNAL_SERVER_ERROR
    )
    request.skip_radix_cache_insert = True


STEP_FAULTS = StepFaults()
"""Of this process."""


def install() -> None:
    """Let SGLang's scheduler tell about its steps. Its class is changed, once: to be called when
    there are experts on the CPU, by then SGLang has applied the hooks of its plugins."""
    from sglang.srt.managers.scheduler import Scheduler

    _before(Scheduler, "run_batch", STEP_FAULTS.before_step)
    _before(Scheduler, "process_batch_result", STEP_FAULTS.before_results)


def _before(owner: type, name: str, first: Callable[..., None]) -> None:
    """Let the method `name` call `first` with its own arguments before it does its work."""
    original = getattr(owner, name)
    if getattr(original, "_hybrid_moe", None) is not None:
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return original(*args, **kwargs)

    method._hybrid_moe = first  # type: ignore[attr-defined]
    setattr(owner, name, method)
