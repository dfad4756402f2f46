"""Parts and places of a model on a machine, fitting or not."""

from __future__ import annotations

from collections import Counter

from hybrid_moe.cpu_kernels.memory import HUGE_PAGE
from hybrid_moe.formats.table import AS_STORED
from hybrid_moe.loaders.drafts import DRAFT
from hybrid_moe.planning import scratch
from hybrid_moe.planning.gpu_share import (
    Placement,
    as_many_as_fit,
    first_ids,
    hot_bytes,
    of_profile,
)
from hybrid_moe.planning.kv_cache import KvCache, kind_of, sglang_cache, transformers_cache
from hybrid_moe.planning.model import EMBEDDINGS, Model
from hybrid_moe.planning.plan import CPU_EXPERTS, GPU, NOWHERE, RAM, Part, Plan, Request
from hybrid_moe.planning.prediction import predict_decode, predict_prefill

DIVIDED = frozenset({"attention", "shared experts", "dense MLP", EMBEDDINGS})
"""Parts that tensor parallelism divides among GPUs; the others are whole on each."""


def lay_out(model: Model, request: Request) -> Plan:
    """The plan, fitting or not: `shortages` is empty.

    Raises:
        ValueError: the configuration lacks a size, or the profile does not fit the model.
    """
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
        differ = "none: the layers' experts differ in format"
        unread = "none: no checkpoint that SGLang can read them from"
        return first_ids(model, 0, differ if model.gpu_format == AS_STORED else unread)
    return as_many_as_fit(model, (request.room - fixed) * len(request.gpus))


def _expert_parts(model: Model, request: Request, placement: Placement) -> list[Part]:
    """The experts on the CPU: one arena for each layer and pool."""
    panels: Counter[str] = Counter()
    rounding = biases = 0
    for layer in model.layers:
        cold = placement.cold(layer)
        panels[layer.method.name] += cold * layer.packed
        biases += cold * layer.bias
        if request.huge_pages and cold:  # each pool's share is rounded; shares are nearly equal
            share = cold * layer.packed / request.pools
            rounding += round(request.pools * (-share % HUGE_PAGE))
    return [
        *(
            Part(f"{CPU_EXPERTS}, {name}", RAM, nbytes, "panels, as large as stored")
            for name, nbytes in panels.items()
        ),
        Part(f"{CPU_EXPERTS}, biases", RAM, biases, "float32"),
        Part(f"{CPU_EXPERTS}, page rounding", RAM, rounding, "huge pages of 2 MiB"),
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


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"
