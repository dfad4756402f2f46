"""Checks at the door: the constructor's arguments and the map of experts, before anything is
allocated.

A message names the argument, what it is, and what would be right.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.weight_format import LayerFormats

UNSUPPORTED: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "cpu_save": (False, "weights are packed in memory and never written back"),
        "mode": ("inference", "only inference is available"),
        "lora_rank": (16, "only inference is available"),
        "lora_alpha": (32.0, "only inference is available"),
        "lora_dropout": (0.0, "only inference is available"),
        "max_cache_depth": (1, "only inference is available"),
        "group_size": (128, "the group size belongs to the method"),
        "zero_point": (True, "zero points belong to the method"),
        "full_weight_grad": (False, "only inference is available"),
    }
)
"""kt-kernel's options without an equivalent here: name -> (default, why it cannot be changed)."""

LARGEST: Mapping[str, int] = MappingProxyType(
    {
        "num_experts": 1 << 16,
        "num_experts_per_tok": 1 << 16,
        "hidden_size": 1 << 20,
        "moe_intermediate_size": 1 << 20,
    }
)
"""Far above any model. A slip of the finger must not make tables that fill the memory."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer.

    Attributes:
        layer_idx: index of the layer in the model, dense layers counted.
        num_experts: routed experts E; ids are 0..E-1.
        num_experts_per_tok: experts per token k.
        hidden_size: H.
        moe_intermediate_size: I, whole (before any split).
    """

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int

    @classmethod
    def of(cls, **sizes: Any) -> LayerShape:
        """The shape of a caller's `sizes`, by name; `TypeError` for one that is no integer."""
        return cls(**{name: integer(name, value) for name, value in sizes.items()})

    def check(self, formats: LayerFormats) -> None:
        """Raise `ValueError` unless a layer of these sizes can exist in `formats`."""
        if self.layer_idx < 0:
            raise ValueError(f"layer_idx is {self.layer_idx}, must be 0 or more")
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, must be 1 or more and at most {largest}"
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, "
                f"more than num_experts {self.num_experts}"
            )
        inputs = (("hidden_size", formats.gate_up), ("moe_intermediate_size", formats.down))
        for name, fmt in inputs:
            if getattr(self, name) % fmt.k_multiple:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, must be a multiple of {fmt.k_multiple} "
                    f"for {fmt.name}"
                )


def integer(name: str, value: Any) -> int:
    """`value` as an int, or `TypeError` naming the argument; bool is not a number here."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def integers(name: str, item: str, values: Any) -> list[int]:
    """`values` as ints, or `TypeError` naming the argument or one `item` of it."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of integers, not {values!r}")
    return [integer(item, value) for value in values]


def number(name: str, value: Any) -> float:
    """`value` as a float, or `TypeError` naming the argument; text and bool are no numbers here."""
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be a number, not {value!r}") from error


def tier_name(isa: Any) -> str | None:
    """`isa` if it is text or None; which tiers there are, the layer knows."""
    if isa is None or isinstance(isa, str):
        return isa
    raise TypeError(f"isa must be the name of a tier or None, not {isa!r}")


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the first option of `UNSUPPORTED` that is not at its default.

    Args:
        given: every argument of the constructor by its name.
    """
    for name, (default, why) in UNSUPPORTED.items():
        value = given[name]
        if not isinstance(value, (type(default), Number)) or value != default:
            raise ValueError(f"{name}={value!r} is not supported ({why}); leave it at {default!r}")


def existing_path(weight_path: str | os.PathLike[str] | None) -> Path | None:
    """The checkpoint's path, resolved; `FileNotFoundError` if it is given and does not exist."""
    if weight_path is None:
        return None
    if not isinstance(weight_path, (str, os.PathLike)):
        raise TypeError(f"weight_path must be a path or None, not {type(weight_path).__name__}")
    try:
        path = Path(weight_path).expanduser()
    except RuntimeError as error:  # "~name" without such a user
        raise FileNotFoundError(f"weight_path {str(weight_path)!r}: {error}") from error
    if not str(weight_path) or not path.exists():
        raise FileNotFoundError(
            f"weight_path {str(weight_path)!r} does not exist; "
            "it must be a checkpoint's directory or file"
        )
    return path.resolve()


def expert_mask(mask: Any, num_gpu_experts: Any, num_experts: int) -> torch.Tensor:
    """Which experts are on the GPU, from either form of the constructor.

    Args:
        mask: bool [E] tensor, or None.
        num_gpu_experts: the first so many ids are on the GPU; None or 0 for none. Given together
            with `mask` it must agree with it.
        num_experts: E.

    Returns:
        bool [E], a new CPU tensor.
    """
    count = 0 if num_gpu_experts is None else integer("num_gpu_experts", num_gpu_experts)
    if not 0 <= count <= num_experts:
        raise ValueError(f"num_gpu_experts is {count}, must be between 0 and {num_experts}")
    if mask is None:
        return torch.arange(num_experts) < count
    check_mask(mask, num_experts)
    if count and count != int(mask.sum()):
        raise ValueError(
            f"num_gpu_experts is {count}, but gpu_experts_mask has {int(mask.sum())} experts on "
            "the GPU; give one of the two"
        )
    given: torch.Tensor = mask
    return given.detach().to("cpu", copy=True).contiguous()


def check_mask(mask: Any, num_experts: int, name: str = "gpu_experts_mask") -> None:
    """Raise unless `mask`, the argument `name`, is a bool tensor [E]."""
    if not isinstance(mask, torch.Tensor):
        number = "; a number of experts is given as num_gpu_experts="
        raise TypeError(
            f"{name} must be a bool tensor [{num_experts}] or None, not "
            f"{type(mask).__name__}{number if name == 'gpu_experts_mask' else ''}"
        )
    if mask.layout is not torch.strided or mask.is_meta:
        raise ValueError(f"{name} must be an ordinary tensor, not a sparse or a meta one")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, not {mask.dtype}")
    if tuple(mask.shape) != (num_experts,):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, must be ({num_experts},): one flag per expert"
        )


def expert_map(physical_to_logical: Any, num_experts: int) -> torch.Tensor:
    """The map of physical to logical ids, checked: int64 [E] on the CPU. None is the identity.

    The upper end of its range is the checkpoint's number of experts, which the loader checks.
    """
    if physical_to_logical is None:
        return torch.arange(num_experts)
    name = "physical_to_logical_map_cpu"
    if not isinstance(physical_to_logical, torch.Tensor):
        raise TypeError(f"{name} must be an int64 tensor, not {type(physical_to_logical).__name__}")
    if physical_to_logical.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int64, not {physical_to_logical.dtype}")
    if physical_to_logical.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {physical_to_logical.device}")
    if tuple(physical_to_logical.shape) != (num_experts,):
        raise ValueError(
            f"{name} has shape {tuple(physical_to_logical.shape)}, must be ({num_experts},): "
            "one checkpoint expert per id"
        )
    if bool((physical_to_logical < 0).any()):
        at = int((physical_to_logical < 0).nonzero()[0])
        raise ValueError(
            f"{name}[{at}] is {int(physical_to_logical[at])}, must be an expert of the checkpoint "
            "(0 or more)"
        )
    return physical_to_logical.to(torch.int64).contiguous()


def deferred_experts(value: Any, shape: LayerShape) -> int:
    """`max_deferred_experts_per_token`, checked; None is 0."""
    name = "max_deferred_experts_per_token"
    count = 0 if value is None else integer(name, value)
    if not 0 <= count <= shape.num_experts_per_tok:
        raise ValueError(
            f"{name} is {count}, must be between 0 and num_experts_per_tok "
            f"{shape.num_experts_per_tok}"
        )
    return count


def batch_sizes(sizes: Any) -> list[int]:
    """Batch sizes as a sorted list of distinct positive ints."""
    checked = sorted(set(integers("capture_bs", "a capture batch size", sizes)))
    if checked and checked[0] < 1:
        raise ValueError(f"a capture batch size is {checked[0]}, must be 1 or more")
    return checked


def pool_config(threads: Any, pools: Any, numa_nodes: Any) -> PoolConfig:
    """The worker pools of `cpuinfer_threads`, `threadpool_count` and `numa_nodes`.

    None stands for one thread per available core, one pool per NUMA node, and every node.
    """
    threads = None if threads is None else integer("cpuinfer_threads", threads)
    pools = None if pools is None else integer("threadpool_count", pools)
    nodes = None
    if numa_nodes is not None:
        nodes = tuple(integers("numa_nodes", "a NUMA node", numa_nodes))
    return PoolConfig.choose(threads, pools, nodes)
