"""Test shims for SGLang on the CPU: -1 ids in its native experts, and a count of the pairs.

A plugin of its own, found by `importlib.metadata` because this folder is on the path. Nothing here
is part of the package, and the package does not know of it.

Arithmetic: only `honour_minus_one`, SGLang's native reference made to leave out pairs with id -1
(on a GPU its kernels do).

The count: for every batch of every layer with `--kt-*`, the (token, expert) pairs that the router
chose, split by the test's own list of hot experts, against the pairs that hybrid_moe's workers
report in the job they finished. The totals lie in files that the test maps (`COUNTERS`), one for
each tensor parallel rank.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

COUNTERS = "HYBRID_MOE_TEST_COUNTERS"
"""Environment variable: how the paths of files begin (`Counters.of_rank`)."""

HOT = "HYBRID_MOE_TEST_HOT"
"""Environment variable: the test's list of hot experts, {layer: [ids]} as JSON."""

FAULT = "HYBRID_MOE_TEST_FAULT"
"""Environment variable: a file; when it appears, the next sync of a layer fails."""

DYNAMIC = "HYBRID_MOE_DYNAMIC"
"""The package's own variable: experts move, and the list of hot ones follows the masks."""

NAMES = (
    "calls",  # of a layer with cold experts
    "chosen",  # pairs that routers chose there
    "cold",  # those of them that are not on the test's list
    "worked",  # pairs that workers finished
    "hot",  # pairs that SGLang's own experts got, or with HYBRID_MOE_GPU our slots
    "wrong",  # calls whose pairs per expert were not what the router chose
    "moved",  # experts that came to the GPU
)

KT_METHOD = "hybrid_moe.integrations.sglang.method.KTEPWrapperMethod"


class Counters:
    """Totals in a mapped file of int64, one for each of `NAMES`: readable while the server runs and
    after it was killed."""

    @classmethod
    def of_rank(cls, path: str | os.PathLike[str], rank: int) -> Counters:
        """Those of one scheduler process."""
        return cls(f"{os.fspath(path)}.{rank}")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        if not file.exists():
            file.write_bytes(bytes(8 * len(NAMES)))
        self._words = np.memmap(file, np.int64, "r+", shape=(len(NAMES),))

    def add(self, name: str, count: int) -> None:
        self._words[NAMES.index(name)] += count

    def read(self) -> dict[str, int]:
        return dict(zip(NAMES, self._words.tolist(), strict=True))


def register() -> None:
    """SGLang's entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    native = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
    HookRegistry.register(native, honour_minus_one, HookType.AROUND)
    if FAULT in os.environ:
        sync = "hybrid_moe.wrapper.KTMoEWrapper.sync_forward"
        HookRegistry.register(sync, fail_once(Path(os.environ[FAULT])), HookType.AROUND)
    if COUNTERS in os.environ:
        hot = {int(layer): ids for layer, ids in json.loads(os.environ[HOT]).items()}
        counting = PairCount(os.environ[COUNTERS], hot)
        HookRegistry.register(f"{KT_METHOD}.apply", counting.around_apply, HookType.AROUND)
        HookRegistry.register(native, counting.before_native, HookType.BEFORE)
        watch_workers(counting.finished)


def fail_once(file: Path) -> Callable[..., Any]:
    """A `sync_forward` that works and then fails when `file` is there."""

    def sync(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if file.exists():
            file.unlink()
            raise RuntimeError(file.name)
        return output

    return sync


def honour_minus_one(
    original: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """SGLang's native experts, one expert at a time, without the pairs that have id -1.

    Layers without `--kt-*` go to SGLang's own function, unchanged.
    """
    weights, ids, _ = topk_output
    if len(layer.w13_weight) == layer.num_experts and bool((ids >= 0).all()):
        return original(layer, x, topk_output, moe_runner_config)
    outputs = torch.zeros(*ids.shape, x.shape[1], dtype=x.dtype)
    for slot in ids[ids >= 0].unique().tolist():
        tokens, places = (ids == slot).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[tokens], layer.w13_weight[slot]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        outputs[tokens, places] = torch.nn.functional.linear(inner, layer.w2_weight[slot])
    return (outputs.to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


class PairCount:
    """Compares what routers chose with what workers did, call by call."""

    def __init__(self, path: str, hot: dict[int, list[int]]) -> None:
        self.hot = hot
        self._path = path
        self._dynamic = DYNAMIC in os.environ
        self._worked: list[npt.NDArray[np.int64]] = []

    @functools.cached_property
    def counters(self) -> Counters:
        """Of this process, whose rank is known when it computes."""
        from sglang.srt.runtime_context import get_parallel

        return Counters.of_rank(self._path, get_parallel().tp_rank)

    def around_apply(
        self, original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any
    ) -> Any:
        if self._dynamic:
            self._follow(layer.layer_id, method.wrapper)
        hot = self.hot[layer.layer_id]
        chosen = pairs_per_expert(dispatch_output.topk_output.topk_ids, layer.num_experts)
        cold = chosen.copy()
        cold[hot] = 0
        if layer.moe_tp_rank:  # the first rank has all of them
            cold[:] = 0
        in_slots = pairs_in_slots(method)
        self._worked.clear()
        output = original(method, layer, dispatch_output)
        worked = sum(self._worked, np.zeros_like(chosen))
        if len(hot) < layer.num_experts:
            self.counters.add("calls", 1)
        self.counters.add("chosen", int(chosen.sum()))
        self.counters.add("cold", int(cold.sum()))
        self.counters.add("worked", int(worked.sum()))
        self.counters.add("hot", pairs_in_slots(method) - in_slots)
        self.counters.add("wrong", int(not np.array_equal(cold, worked)))
        return output

    def _follow(self, layer: int, wrapper: Any) -> None:
        """Experts that have changed places since the layer's latest call are expected there."""
        now: list[int] = wrapper.gpu_experts_mask.nonzero().flatten().tolist()
        self.counters.add("moved", len(set(now) - set(self.hot[layer])))
        self.hot[layer] = now

    def before_native(self, layer: Any, x: Any, topk_output: Any, config: Any) -> None:
        self.counters.add("hot", int((topk_output[1] >= 0).sum()))

    def finished(self, worked: npt.NDArray[np.int64]) -> None:
        self._worked.append(worked)


def pairs_in_slots(method: Any) -> int:
    """Pairs that a layer's wrapper has computed in slots so far."""
    if method.wrapper is None or method.gpu_backend is None:
        return 0
    on_gpu: int = method.wrapper.pairs[0]
    return on_gpu


def pairs_per_expert(ids: torch.Tensor, num_experts: int) -> npt.NDArray[np.int64]:
    """int64 [E]: how many of `ids` name each expert; -1 names none."""
    return torch.bincount(ids[ids >= 0].flatten(), minlength=num_experts).numpy()


def watch_workers(finished: Callable[[npt.NDArray[np.int64]], None]) -> None:
    """Call `finished` with the pairs per expert of each job that hybrid_moe's workers complete.

    Read from the job's entry in the ring when somebody has waited for the job and before its
    memory is used again: routing as the workers saw it, and that every task of both matrix phases
    was done. Whatever way a batch takes on the CPU, it is waited for there.
    """
    from hybrid_moe.cpu_kernels.drivers.records import RING
    from hybrid_moe.cpu_kernels.pool.group import PoolGroup

    original = PoolGroup.wait

    def wait(self: PoolGroup, sequence: int) -> None:
        original(self, sequence)
        finished(pairs_of_job(self, sequence))

    def pairs_of_job(group: PoolGroup, sequence: int) -> npt.NDArray[np.int64]:
        entry = group.control.ring[sequence % RING]
        if entry.sequence.value != sequence:
            raise RuntimeError(f"job {sequence} is no longer in the ring: its pairs are unknown")
        for index in range(entry.phase_count.value):
            done, total = entry.phases[index].done.value, entry.phases[index].total.value
            if done != total:
                raise RuntimeError(f"job {sequence}: {done} of {total} tasks of phase {index}")
        job = entry.job
        ids = int32_at(job.active_expert.address, job.active)
        starts = int32_at(job.active_start.address, job.active + 1)
        experts = job.layer.experts
        pairs = np.zeros(experts, np.int64)
        pairs[ids] = np.diff(starts)
        return pairs

    PoolGroup.wait = wait  # type: ignore[method-assign]


def int32_at(address: int, count: int) -> npt.NDArray[np.int32]:
    """A copy of int32 [count] in this process's memory."""
    return np.array((ctypes.c_int32 * count).from_address(address), np.int32)
