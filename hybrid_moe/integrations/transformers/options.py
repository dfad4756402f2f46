"""Which weight format and which threads a model's experts use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hybrid_moe.formats.activation import activation_bits
from hybrid_moe.formats.table import DENSE_FORMATS, format_named
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.logs import warn_once

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig

ATTRIBUTE = "hybrid_moe_options"
"""Attribute of a model's config that holds the options of `experts_implementation="hybrid_moe"`."""

DENSE_TORCH = "torch"
"""The choice of `dense` that leaves the linear layers beside the experts to torch."""


BACKENDS = ("cute", "torch")
"""What computes hot experts: CuTe kernels, or their references in torch on any device."""


def choose_backend(gpu_backend: str | None, on_gpu: bool | None) -> str:
    """What computes hot experts, of `BACKENDS`.

    Args:
        gpu_backend: what the user wants; None for CuTe where it can be used, else torch, which is
            logged once with the reason.
        on_gpu: whether the model is on a GPU; None where it can go there.

    Raises:
        ValueError: an unknown back end, or CuTe where it cannot be used; the message says why.
    """
    if gpu_backend is not None and gpu_backend not in BACKENDS:
        raise ValueError(f"gpu_backend is {gpu_backend!r}: choices are {', '.join(BACKENDS)}")
    if gpu_backend == "torch":
        return gpu_backend
    obstacle = "the model is on the CPU"
    if on_gpu is not False:
        from hybrid_moe.gpu_kernels.toolchain import availability

        found = availability()
        if found.usable:
            return "cute"
        obstacle = found.reason
    if gpu_backend is not None:
        raise ValueError(f'gpu_backend="cute" cannot be used here: {obstacle}')
    warn_once(f"hot experts are computed by torch, which is slow: {obstacle}")
    return "torch"


def dense_format(dense: str) -> WeightFormat | None:
    """The format in which dense layers are held; None for "torch".

    Args:
        dense: name of a weight format in any case ("bf16", ...), or "torch".

    Raises:
        ValueError: neither; the message lists the choices.
    """
    if dense == DENSE_TORCH:
        return None
    fmt = DENSE_FORMATS.get(str(dense).upper())
    if fmt is None:
        choices = ", ".join([*(name.lower() for name in DENSE_FORMATS), DENSE_TORCH])
        raise ValueError(f"dense is {dense!r}: choices are {choices}")
    return fmt


@dataclass(frozen=True)
class ExpertsOptions:
    """How experts are packed and run.

    Attributes:
        method: see `hybrid_moe.formats.table.format_named`.
        threads: worker threads over all pools; None for one per available core.
        pools: worker pools; None for one per NUMA node.
        cpu_activation: "int8" for inputs of products in 8 bits, see `KTMoEWrapper`.
    """

    method: str = "BF16"
    threads: int | None = None
    pools: int | None = None
    cpu_activation: str | None = None

    @property
    def fmt(self) -> WeightFormat:
        """The weight format. Raises ValueError for an unknown method."""
        return format_named(self.method)

    @property
    def activation_bits(self) -> int:
        """Of the inputs of products. Raises ValueError for another `cpu_activation`."""
        return activation_bits(self.cpu_activation)

    def check_activation(self, formats: Iterable[LayerFormats]) -> None:
        """Raise ValueError where weights held so take no inputs of 8 bits."""
        if self.activation_bits == 16:
            return
        from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels

        for fmt in {fmt for held in formats for fmt in held.each}:
            format_kernels(fmt, self.activation_bits)

    def pool_config(self) -> PoolConfig:
        """The worker pools. Raises ValueError where this machine cannot have them."""
        from hybrid_moe.cpu_kernels.pool.config import PoolConfig

        return PoolConfig.choose(self.threads, self.pools)

    @classmethod
    def of(cls, config: Any) -> ExpertsOptions:
        """The options that a model's config carries in `ATTRIBUTE` (a mapping), if any."""
        given = getattr(config, ATTRIBUTE, None)
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise ValueError(
                f"config.{ATTRIBUTE} is {given!r}, it must be a mapping with keys among {known}"
            )
        return cls(**given)
