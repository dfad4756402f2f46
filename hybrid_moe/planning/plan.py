"""The plan: what goes where, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hybrid_moe.cpu_kernels.memory import HUGE_PAGE
from hybrid_moe.formats import BF16, MXFP4
from hybrid_moe.placement_profile import PlacementProfile
from hybrid_moe.planning import scratch
from hybrid_moe.planning.gpu_share import (
    Placement,
    as_many_as_fit,
    first_ids,
    hot_bytes,
    of_profile,
)
from hybrid_moe.planning.kv_cache import KvCache, kind_of, sglang_cache, transformers_cache
from hybrid_moe.planning.machine import CpuSpeeds, Gpu
from hybrid_moe.planning.model import DRAFT, EMBEDDINGS, Model
from hybrid_moe.planning.prediction import Prediction, predict_decode, predict_prefill

GPU, RAM, NOWHERE = "each GPU", "RAM", "not loaded"

DIVIDED = frozenset({"attention", "shared experts", "dense MLP", EMBEDDINGS})
"""Parts that tensor parallelism divides among GPUs; the others are whole on each."""

_CONTEXT_STEP = 1024
_MOST_SUGGESTED_CONTEXT = 1 << 21


class DoesNotFitError(ValueError):
    """The model does not fit; the message says by how much and what to change."""


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
        huge_pages: arenas get huge pages.
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
    huge_pages: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "requests", "chunk", "threads", "pools"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")
        if self.num_gpu_experts and self.profile is not None:
            raise ValueError("give a number of experts for the GPU or a profile, not both")
        if not self.gpus and (self.num_gpu_experts or self.profile is not None):
            raise ValueError("experts on the GPU need a GPU: say which with --gpu")

    @property
    def room(self) -> int:
        """Bytes of the smallest GPU: tensor parallelism gives all the same."""
        return min(gpu.nbytes for gpu in self.gpus)


@dataclass(frozen=True)
class Part:
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
        over = (self.needed - self.available) / (1 << 30)
        return (
            f"{self.where} is too small by {over:.1f} GiB ({self.needed / (1 << 30):.1f} GiB "
            f"needed, {self.available / (1 << 30):.1f} there): {', or '.join(self.advice)}"
        )


@dataclass(frozen=True)
class Plan:
    """A model on a machine, before anything is loaded. Sizes are in bytes.

    Attributes:
        model, request: what was planned.
        parts: everything that takes memory.
        placement: experts on the GPU by layer.
        cache: the KV cache.
        decode, prefill: predicted speed of one request.
        shortages: what does not fit; empty for a plan that can be carried out.
        notes: what the numbers do not say.
    """

    model: Model
    request: Request
    parts: tuple[Part, ...]
    placement: Placement
    cache: KvCache
    decode: Prediction
    prefill: Prediction
    shortages: tuple[Shortage, ...]
    notes: tuple[str, ...]

    def nbytes(self, place: str) -> int:
        """Bytes in all at a place."""
        return sum(part.nbytes for part in self.parts if part.place == place)

    @property
    def expert_ram(self) -> int:
        """Resident bytes of the experts on the CPU: panels, biases, and rounding to pages."""
        return sum(part.nbytes for part in self.parts if part.name.startswith("routed experts, C"))

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
                "method": model.method.name,
                "gpu_format": model.gpu_format,
            },
            "gpus": [asdict(gpu) for gpu in request.gpus],
            "cpu": {**asdict(request.cpu), "threads": request.threads, "pools": request.pools},
            "context": request.context,
            "parts": [asdict(part) for part in self.parts],
            "gpu_bytes": self.nbytes(GPU),
            "ram_bytes": self.nbytes(RAM),
            "gpu_experts": {str(k): v for k, v in self.placement.hot.items()},
            "placement": self.placement.rule,
            "kv_cache": self.cache.formula,
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
            "shortages": [shortage.message for shortage in self.shortages],
            "notes": list(self.notes),
        }


def make_plan(model: Model, request: Request) -> Plan:
    """Plan `model` on the machine of `request`. What does not fit is in `Plan.shortages`.

    Raises:
        ValueError: the configuration lacks a size, or the profile does not fit the model.
    """
    plan = _lay_out(model, request)
    shortages = []
    if request.gpus and plan.nbytes(GPU) > request.room:
        shortages.append(_gpu_shortage(plan))
    if plan.nbytes(RAM) > request.ram:
        shortages.append(_ram_shortage(plan))
    return replace(plan, shortages=tuple(shortages))


def _lay_out(model: Model, request: Request) -> Plan:
    """The plan, fitting or not."""
    config = model.config
    if request.gpus:
        cache = sglang_cache(config, request.context, request.chunk, request.requests)
        fixed = _gpu_parts(model, request, cache)
        placement = _place(model, request, sum(p.nbytes for p in fixed if p.place == GPU))
        hot = -(-hot_bytes(model, placement) // len(request.gpus))
        name = f"routed experts, {model.gpu_format}"
        parts = [Part(name, GPU, hot, _counts(placement)), *fixed]
    else:
        cache = transformers_cache(config, request.context)
        placement = first_ids(model, 0, "no GPU")
        parts = _cpu_parts(model, request, cache)
    parts = [*_expert_parts(model, request, placement), *parts]
    return Plan(
        model=model,
        request=request,
        parts=tuple(part for part in parts if part.nbytes),
        placement=placement,
        cache=cache,
        decode=predict_decode(model, placement, request.cpu, request.gpus, cache),
        prefill=predict_prefill(
            model, placement, request.cpu, request.gpus, min(request.chunk, request.context)
        ),
        shortages=(),
        notes=tuple(_notes(model, request)),
    )


def _place(model: Model, request: Request, fixed: int) -> Placement:
    """Experts on the GPU, beside `fixed` bytes on each."""
    if request.profile is not None:
        return of_profile(model, request.profile)
    if request.num_gpu_experts is not None:
        return first_ids(model, request.num_gpu_experts, "as given, the first ids of every layer")
    if not model.hot_possible:
        return first_ids(model, 0, "none: no checkpoint that SGLang can read them from")
    return as_many_as_fit(model, (request.room - fixed) * len(request.gpus))


def _expert_parts(model: Model, request: Request, placement: Placement) -> list[Part]:
    """The experts on the CPU: one arena for each layer and pool."""
    panels = rounding = biases = 0
    for layer in model.layers:
        cold = placement.cold(layer)
        panels += cold * layer.packed
        biases += cold * layer.bias
        if request.huge_pages and cold:  # each pool's share is rounded; shares are nearly equal
            share = cold * layer.packed / request.pools
            rounding += round(request.pools * (-share % HUGE_PAGE))
    name = f"routed experts, CPU, {model.method.name}"
    return [
        Part(name, RAM, panels, "panels, as large as stored"),
        Part("routed experts, CPU, biases", RAM, biases, "float32"),
        Part("routed experts, CPU, page rounding", RAM, rounding, "huge pages of 2 MiB"),
    ]


def _gpu_parts(model: Model, request: Request, cache: KvCache) -> list[Part]:
    """Everything but routed experts, on each GPU and in RAM, under SGLang."""
    gpus = len(request.gpus)
    parts = []
    for name, nbytes in model.parts.items():
        if name == DRAFT:
            parts.append(Part(name, NOWHERE, nbytes, "only for speculative decoding"))
        elif name in DIVIDED and gpus > 1:
            parts.append(Part(name, GPU, -(-nbytes // gpus), f"1/{gpus} of {_gib(nbytes)}"))
        else:
            parts.append(Part(name, GPU, nbytes))
    mla = kind_of(model.config) in ("mla", "deepseek_v4")
    reserve = scratch.gpu_reserve(request.chunk, request.requests, gpus, mla=mla)
    runtime = scratch.SGLANG_RAM + gpus * scratch.SGLANG_RAM_PER_GPU
    buffers = scratch.stream_buffers(model, request.chunk, request.threads, request.pools)
    return [
        *parts,
        Part("KV cache", GPU, cache.per_gpu(gpus), cache.formula),
        Part("activations, graphs", GPU, reserve, "SGLang's own rule", assumed=True),
        Part("CUDA context", GPU, scratch.GPU_CONTEXT, "1 GiB", assumed=True),
        Part("buffers of the CPU experts", RAM, buffers, f"chunks of {request.chunk} tokens"),
        Part("SGLang's processes", RAM, runtime, "4 GiB and 2 GiB per GPU", assumed=True),
    ]


def _cpu_parts(model: Model, request: Request, cache: KvCache) -> list[Part]:
    """Everything but the experts, in RAM, under Transformers."""
    stored = sum(nbytes for name, nbytes in model.parts.items() if name != DRAFT)
    note = "as stored" if stored == model.bytes_16bit else f"BF16; {_gib(stored)} stored"
    buffers = scratch.cpu_buffers(model, request.context, request.threads, request.pools)
    activations = scratch.cpu_activations(model, request.context)
    return [
        Part("everything but routed experts", RAM, model.bytes_16bit, note),
        Part(DRAFT, NOWHERE, model.parts.get(DRAFT, 0), "only for speculative decoding"),
        Part("KV cache", RAM, cache.per_gpu(), cache.formula),
        Part("buffers of the CPU experts", RAM, buffers, "batches are cut at 2048 tokens"),
        Part("activations", RAM, activations, "16 x context x H x 2 B", assumed=True),
        Part("Python, torch", RAM, scratch.TRANSFORMERS_RAM, "1 GiB", assumed=True),
    ]


def _counts(placement: Placement) -> str:
    counts = set(placement.hot.values())
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"{number} per layer; {placement.rule}"


def _notes(model: Model, request: Request) -> list[str]:
    notes = []
    if request.gpus and not model.hot_possible:
        notes.append(
            f"{model.base} was written by `hybrid-moe convert`, whose experts SGLang cannot put on "
            "a GPU: give the original checkpoint as --base to use GPU experts"
        )
    if request.gpus and len({gpu.nbytes for gpu in request.gpus}) > 1:
        notes.append("tensor parallelism gives every GPU the same: the smallest one counts")
    limit = model.max_context
    if limit is not None and request.context > limit:
        notes.append(f"the model was made for {limit} tokens, fewer than --context")
    if request.gpus:
        notes.append("no GPU has run this yet: GPU figures are computed, not measured")
    else:
        notes.append("everything is for Transformers, as `hybrid-moe generate` runs it")
    return notes


# What would make it fit -------------------------------------------------------------------------


def _gpu_shortage(plan: Plan) -> Shortage:
    request, model = plan.request, plan.model
    room, needed = request.room, plan.nbytes(GPU)
    advice = []
    if plan.placement.most:
        bare = replace(request, num_gpu_experts=None, profile=None)
        count = _lay_out(model, bare).placement.most
        if _fits_gpu(model, replace(bare, num_gpu_experts=count)):
            advice.append(f"fewer experts on the GPU ({count} per layer fit)")
    least = replace(request, num_gpu_experts=0, profile=None)
    context = _largest_context(lambda n: _fits_gpu(model, replace(least, context=n)), request)
    if context:
        advice.append(f"a smaller context (--context {context} fits)")
    if request.chunk > 2048 and _fits_gpu(model, replace(least, chunk=2048)):
        advice.append("smaller chunks (--chunk 2048 fits)")
    for more in (2, 4, 8):
        gpus = request.gpus[:1] * more
        if more > len(request.gpus) and _fits_gpu(model, replace(least, gpus=gpus)):
            advice.append(f"{more} such GPUs (--gpu {more}x{_gib(room, '')})")
            break
    if not advice:
        fixed = _lay_out(model, least).nbytes(GPU)
        advice.append(f"a GPU of {_gib(fixed)} or more; or the CPU alone, without --gpu")
    return Shortage(f"GPU memory ({_gib(room)} each)", needed, room, tuple(advice))


def _ram_shortage(plan: Plan) -> Shortage:
    request, model = plan.request, plan.model
    needed = plan.nbytes(RAM)
    advice = []
    if model.method is BF16:
        panels = sum(p.nbytes for p in plan.parts if p.name == "routed experts, CPU, BF16")
        saved = round(panels * (1 - MXFP4.bits_per_weight / BF16.bits_per_weight))
        fits = "fits then" if needed - saved <= request.ram else "still too much"
        advice.append(f"MXFP4 experts (--method MXFP4: {_gib(needed - saved)} in all, {fits})")
    if not request.gpus:
        context = _largest_context(lambda n: _fits_ram(model, replace(request, context=n)), request)
        if context:
            advice.append(f"a smaller context (--context {context} fits)")
        advice.append(
            "a GPU (--gpu), which takes everything but the routed experts and some of them"
        )
    else:
        over = needed - request.ram
        each = sum(layer.packed for layer in model.layers)
        more = -(-over // each)
        if plan.placement.most + more < model.num_experts:
            on_gpu = more * sum(layer.on_gpu for layer in model.layers)
            advice.append(
                f"{more} more experts of each layer on GPUs, {_gib(on_gpu)} more of their memory"
            )
    advice.append(f"{_gib(needed)} of memory or more")
    return Shortage("memory", needed, request.ram, tuple(advice))


def _fits_gpu(model: Model, request: Request) -> bool:
    return _lay_out(model, request).nbytes(GPU) <= request.room


def _fits_ram(model: Model, request: Request) -> bool:
    return _lay_out(model, request).nbytes(RAM) <= request.ram


def _largest_context(fits: Callable[[int], bool], request: Request) -> int:
    """The largest context below the asked one that fits, a multiple of 1024; 0 for none."""
    low, high = 0, (request.context - 1) // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _CONTEXT_STEP):
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP


def _gib(nbytes: int, unit: str = " GiB") -> str:
    if not unit:
        return f"{nbytes >> 30}GB"
    return f"{nbytes / (1 << 30):.1f}{unit}"
