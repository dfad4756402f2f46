"""`experts_implementation="hybrid_moe"`: experts that stay in their module and are packed at use.

The module keeps its parameters, so the memory is spent twice; in return any model that
Transformers has loaded can try the CPU experts and go back. `hybrid_moe.offload` and
`hybrid_moe.from_pretrained` are the ways that do not spend it twice.

Parameters can be written in many ways that leave no trace (`.data`, NumPy arrays on the same
memory, another process), and be replaced by others with the same content (accelerate's hooks do so
in every forward). So packed weights are judged by content alone: every call takes fingerprints of
the weights of the experts that it uses, and packs anew if one is not what was packed. That reads
those weights once more, about what the experts themselves read in BF16.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from hybrid_moe.cpu_kernels.fingerprint import fingerprints
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.weight_format import layer_formats
from hybrid_moe.integrations.transformers.experts_module import (
    ExpertsSpec,
    experts_spec,
    weights_of,
)
from hybrid_moe.integrations.transformers.hybrid_experts import fill, new_layer, run_layer
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime import torch_op

_log = logging.getLogger(__name__)

_PACKED, _HANDLE = "_hybrid_moe_packed", "_hybrid_moe_handle"

_parametrized = ProcessLock()

Prints = dict[int, tuple[tuple[int, ...], ...]]
"""Expert -> fingerprints of its weights, one entry a weight."""

Layout = tuple[tuple[str, torch.Size, torch.dtype], ...]
"""What weights there are: name, shape, dtype."""


@dataclass(frozen=True)
class _Packed:
    """What a module's weights and options were when they were packed, and the result.

    A copy of the module shares it as long as its weights are the same; a pickle has None instead.
    """

    options: ExpertsOptions
    layout: Layout
    prints: Prints
    spec: ExpertsSpec
    layer: ExpertLayer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def holds(
        self, options: ExpertsOptions, weights: dict[str, torch.Tensor], experts: Sequence[int]
    ) -> bool:
        """Whether these experts of `weights` are what was packed."""
        if options != self.options or _layout(weights) != self.layout:
            return False
        now = _prints(weights, experts, self.layer.pool.threads)
        return all(now[e] == self.prints[e] for e in experts)


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run an experts module of Transformers on the CPU kernels, with the weights that it has now.

    The first call packs the module's weights, as does any that meets other weights than were
    packed, however they were changed. Method, threads and pools come from
    `config.hybrid_moe_options` (a mapping such as `{"method": "MXFP4", "threads": 8}`), by default
    BF16 on every core. In a graph that is captured it is one node, see `runtime.torch_op`.

    Args:
        module: the experts module.
        hidden_states: [S, H].
        top_k_index: [S, k]; ids outside the module's experts (expert parallel) contribute zero.
        top_k_weights: [S, k].

    Raises:
        NotImplementedError: the module computes something that this package does not.
        RuntimeError: its weights are not in memory.
    """
    if torch_op.is_traced(hidden_states):
        _ensure_handle(module)
        handle: torch_op.Handle = getattr(module, _HANDLE)
        return torch_op.experts(hidden_states, top_k_index, top_k_weights, handle.value)
    return _run(module, hidden_states, top_k_index, top_k_weights)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _ensure_handle(module: torch.nn.Module) -> None:
    """Give the module a handle; runs while a graph is captured, and is no part of it."""
    if module.__dict__.get(_HANDLE) is None:
        module.__dict__[_HANDLE] = torch_op.Handle(module, _run)


def _run(
    module: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    if parametrize.is_parametrized(module):
        # What is computed is computed once. The cache is a global of torch that threads share.
        with _parametrized, parametrize.cached():
            packed = _packed(module, ids)
    else:
        packed = _packed(module, ids)
    return run_layer(packed.layer, packed.spec, hidden, ids, weights)


def _packed(module: torch.nn.Module, ids: torch.Tensor) -> _Packed:
    """The module's packed weights, right for the experts that `ids` name."""
    options = ExpertsOptions.of(getattr(module, "config", None))
    weights = weights_of(module)
    packed: _Packed | None = module.__dict__.get(_PACKED)
    if packed is not None:
        named = np.unique(ids.detach().cpu().numpy())
        experts = named[(named >= 0) & (named < packed.spec.num_experts)].tolist()
        if packed.holds(options, weights, experts):
            return packed
    del packed
    module.__dict__.pop(_PACKED, None)  # frees the strips, unless a copy has them too
    if _is_offloaded(module):
        _warn_of_offloading()
    spec = experts_spec(module)
    layer = new_layer(spec, options, layer_formats(options.fmt))
    # Before packing: what changes meanwhile is found by the next call
    prints = _prints(weights, range(spec.num_experts), layer.pool.threads)
    fill(layer, module, spec, options.fmt)
    packed = _Packed(options, _layout(weights), prints, spec, layer)
    module.__dict__[_PACKED] = packed
    return packed


def _layout(weights: dict[str, torch.Tensor]) -> Layout:
    return tuple((name, w.shape, w.dtype) for name, w in weights.items())


def _prints(weights: dict[str, torch.Tensor], experts: Sequence[int], threads: int) -> Prints:
    spans, kept = [], []
    for name, weight in weights.items():
        _check_in_memory(name, weight)
        rows: Sequence[int] = experts
        size = math.prod(weight.shape[1:]) * weight.element_size()
        in_place = weight.device.type == "cpu" and weight.is_contiguous()
        if not in_place or (weight.data_ptr() | size) % 8:
            units = weight[list(experts)].cpu().reshape(len(experts), math.prod(weight.shape[1:]))
            weight = torch.nn.functional.pad(units.view(torch.uint8), (0, -size % 8))
            rows, size = range(len(experts)), weight.shape[1]
        kept.append(weight)  # until it has been read
        spans.append([(weight.data_ptr() + row * size, size) for row in rows])
    done = fingerprints([span for of_one in spans for span in of_one], threads)
    columns = [done[i * len(experts) : (i + 1) * len(experts)] for i in range(len(spans))]
    return dict(zip(experts, zip(*columns, strict=True), strict=True))


def _check_in_memory(name: str, weight: torch.Tensor) -> None:
    """Wrappers that move weights in and out leave tensors without memory behind."""
    if not weight.is_meta:
        last = sum((n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True))
        end = (weight.storage_offset() + last + 1) * weight.element_size()
        if weight.untyped_storage().nbytes() >= end:
            return
    raise RuntimeError(
        f"{name} of this experts module has no memory now (on meta, or freed by a wrapper such as "
        "FSDP): hybrid_moe cannot read its weights"
    )


def _is_offloaded(module: torch.nn.Module) -> bool:
    """Whether hooks of accelerate bring the module's weights for each forward, and drop them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(h, "offload", False) for h in hooks)


@functools.lru_cache(maxsize=1)
def _warn_of_offloading() -> None:
    """Says so once, not once a layer."""
    _log.warning(
        "accelerate (device_map, cpu_offload) moves the weights of these experts for every forward "
        "pass, though hybrid_moe has packed them: hybrid_moe.from_pretrained loads experts once, "
        "straight into strips, and nothing moves them"
    )
