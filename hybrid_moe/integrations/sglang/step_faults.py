"""A worker's fault, or a GPU out of memory, fails the requests of its step; the server goes on.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from hybrid_moe.integrations.sglang import gpu_backend
from hybrid_moe.runtime.gpu_faults import GpuLostError, GpuMemoryError, lost_gpu
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
        """Keep what a forward pass met; raises it where nothing could be done about it, as for a
        GPU that is lost."""
        if not self.alone or isinstance(error, GpuLostError):
            raise with_options(error) from error
        self._kept = self._kept or with_options(error)

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
            with named_options():
                _wait_for(copied)
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


@contextmanager
def named_options() -> Iterator[None]:
    """Let a fault on the GPU say which options of SGLang cure it."""
    try:
        yield
    except (GpuMemoryError, GpuLostError) as error:
        raise with_options(error) from error


def with_options(error: Exception) -> Exception:
    """A fault on the GPU with the options of SGLang that cure it; other errors as they are."""
    if isinstance(error, GpuMemoryError):
        return GpuMemoryError(
            f"{error}. --kt-num-gpu-experts or the placement profile says how many experts are "
            "there; a lower --mem-fraction-static or --chunked-prefill-size leaves more room"
        )
    if isinstance(error, GpuLostError):
        return GpuLostError(
            f"{error}. Before CUDA_LAUNCH_BLOCKING=1 can show it, switch graphs off "
            "(--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled); "
            f"{gpu_backend.VARIABLE} is what this package calls gpu_backend"
        )
    return error


def _wait_for(copied: Any) -> None:
    """Wait until a step's results have arrived. A fault of a replayed graph is met here."""
    try:
        copied.synchronize()
    except RuntimeError as error:
        lost = None if gpu_backend.chosen() is None else lost_gpu("the GPU", error)
        if lost is None:
            raise
        raise lost from error


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

    before(Scheduler, "run_batch", STEP_FAULTS.before_step)
    before(Scheduler, "process_batch_result", STEP_FAULTS.before_results)


def before(owner: type, name: str, first: Callable[..., None]) -> None:
    """Let the method `name` call `first` with its own arguments before it does its work; once,
    however often it is asked to."""
    original = getattr(owner, name)
    already: tuple[Callable[..., None], ...] = getattr(original, "_hybrid_moe", ())
    if first in already:
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return original(*args, **kwargs)

    method._hybrid_moe = (*already, first)  # type: ignore[attr-defined]
    setattr(owner, name, method)
