"""The plan: what was asked, what goes where, whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_moe.cpu_kernels.drivers.records import MAX_POOLS
from hybrid_moe.placement.profile import PlacementProfile
from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.planning.kv_cache import KvCache
from hybrid_moe.planning.machine import CpuSpeeds, Gpu
from hybrid_moe.planning.model import HotExperts, Model
from hybrid_moe.planning.terms import Prediction
from hybrid_moe.text import format_bytes

GPU, RAM, NOWHERE = "each GPU", "RAM", "not loaded"
CPU_EXPERTS = "routed experts, CPU"
"""How the names of parts begin that are experts on the CPU."""


class DoesNotFitError(ValueError):
    """The model does not fit; the message says by how much and what to change."""


@dataclass(frozen=True)
class MeasuredRouting:
    """A routing profile, and the file that it is from."""

    path: Path
    profile: RoutingProfile

    @property
    def placement_path(self) -> Path:
        """Where `serve` writes the placement that it made of it."""
        return self.path.with_suffix(".placement.json")


@dataclass(frozen=True)
class BudgetPoint:
    """What so much GPU memory for experts gives, over all GPUs.

    Attributes:
        nbytes: of experts. share: of the bytes of all.
        hit_rate: share of pairs of a token and an expert that are the GPU's.
        tokens_per_second: of one request.
        first_ids_hit_rate, first_ids_tokens_per_second: with the first ids of every layer instead.
        chosen: it is what the plan has.
    """

    nbytes: int
    share: float
    hit_rate: float
    tokens_per_second: float
    first_ids_hit_rate: float
    first_ids_tokens_per_second: float
    chosen: bool


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        gpus: empty for the CPU alone.
        ram: bytes of memory.
        context: tokens of the longest request.
        requests: requests that run at the same time; they share the cache.
        chunk: tokens that a server prefills at once.
        threads, pools: of the CPU.
        cpu: its ceilings.
        num_gpu_experts: experts of each layer on the GPU; None for as many as fit.
        profile: which ones; None for the first ids.
        routing: measured routing: the experts with which a token is fastest, as many as fit.
        slots: experts of each layer that Transformers holds in slots and computes with torch, where
            there is no GPU; None for none.
        huge_pages: arenas get huge pages.
        stream_memory: bytes of each GPU for experts that travel there during prefill.
    """

    gpus: tuple[Gpu, ...]
    ram: int
    context: int
    requests: int
    chunk: int
    threads: int
    pools: int
    cpu: CpuSpeeds
    num_gpu_experts: int | None = None
    profile: PlacementProfile | None = None
    routing: MeasuredRouting | None = None
    slots: Mapping[int, int] | None = None
    huge_pages: bool = True
    stream_memory: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "requests", "chunk", "threads", "pools"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")
        if self.pools > min(self.threads, MAX_POOLS):
            raise ValueError(
                f"{self.pools} pools for {self.threads} threads: every pool needs a thread, and "
                f"at most {MAX_POOLS} pools are supported"
            )
        given = self.profile is not None or self.routing is not None
        if self.num_gpu_experts and given:
            raise ValueError("give a number of experts for the GPU or a profile, not both")
        if not self.gpus and (self.num_gpu_experts or given):
            raise ValueError("experts on the GPU need a GPU: say which with --gpu")

    @property
    def room(self) -> int:
        """Bytes of the smallest GPU: tensor parallelism gives all the same."""
        return min(gpu.nbytes for gpu in self.gpus)


@dataclass(frozen=True)
class MemoryPart:
    """Bytes of one part of the model or of the runtime, and where they are.

    `assumed`: neither measured nor computed; `note` says how it comes about.
    """

    name: str
    place: str
    nbytes: int
    note: str = ""
    assumed: bool = False


@dataclass(frozen=True)
class Shortage:
    """A memory that is too small: by how many bytes, and what would help."""

    where: str
    needed: int
    available: int
    advice: tuple[str, ...]

    @property
    def message(self) -> str:
        """One paragraph."""
        return (
            f"{self.where} is too small by {format_bytes(self.needed - self.available)} "
            f"({format_bytes(self.needed)} needed, {format_bytes(self.available)} there): "
            f"{', or '.join(self.advice)}"
        )


@dataclass(frozen=True)
class Plan:
    """A model on a machine, before anything is loaded. Sizes are in bytes.

    Attributes:
        model, request: what was planned.
        parts: everything that takes memory.
        hot: experts on the GPU by layer.
        cache: the KV cache.
        decode, prefill: predicted speed of one request.
        shortages: what does not fit; empty for a plan that can be carried out.
        notes: what the numbers do not say.
        curve: what other amounts of GPU memory would give, where the routing was measured.
    """

    model: Model
    request: Request
    parts: tuple[MemoryPart, ...]
    hot: HotExperts
    cache: KvCache
    decode: Prediction
    prefill: Prediction
    shortages: tuple[Shortage, ...]
    notes: tuple[str, ...]
    curve: tuple[BudgetPoint, ...] = ()

    def nbytes(self, place: str) -> int:
        """Bytes in all at a place."""
        return sum(part.nbytes for part in self.parts if part.place == place)

    def check(self) -> None:
        """Raise `DoesNotFitError` where something is too small."""
        if self.shortages:
            raise DoesNotFitError("; ".join(shortage.message for shortage in self.shortages))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        model, request = self.model, self.request
        return {
            "model": {
                "path": str(model.path),
                "base": str(model.base),
                "family": model.family,
                "method": model.method,
                "gpu_format": model.gpu_format,
                "gpu_backend": model.gpu_backend,
            },
            "gpus": [asdict(gpu) for gpu in request.gpus],
            "cpu": {**asdict(request.cpu), "threads": request.threads, "pools": request.pools},
            "context": request.context,
            "parts": [asdict(part) for part in self.parts],
            "gpu_bytes": self.nbytes(GPU),
            "ram_bytes": self.nbytes(RAM),
            "gpu_experts": {str(k): v for k, v in self.hot.counts.items()},
            "placement": self.hot.rule,
            "kv_cache": self.cache.formula,
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
            "shortages": [shortage.message for shortage in self.shortages],
            "notes": list(self.notes),
            "curve": [asdict(point) for point in self.curve],
        }
