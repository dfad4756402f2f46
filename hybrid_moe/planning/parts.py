"""What of a model takes memory on a machine and where, fitting or not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hybrid_moe.cpu_kernels.memory import HUGE_PAGE
from hybrid_moe.loaders.drafts import DRAFT
from hybrid_moe.placement.hot_masks import LayerOfExperts, hot_masks
from hybrid_moe.planning import cpu_only, scratch
from hybrid_moe.planning.hot_choice import choose_hot, first_ids, hot_share
from hybrid_moe.planning.kv_cache import KvCache, kind_of, sglang_cache, transformers_cache
from hybrid_moe.planning.linear_layers import EMBEDDINGS, DenseLayers
from hybrid_moe.planning.model import HotExperts, Model
from hybrid_moe.planning.plan import CPU_EXPERTS, GPU, NOWHERE, RAM, MemoryPart, Plan, Request
from hybrid_moe.planning.prediction import predict_decode, predict_prefill
from hybrid_moe.planning.step_work import num_layers
from hybrid_moe.text import format_bytes

_REST = "embeddings, norms, routers and what else there is"

DIVIDED = frozenset({"attention", "shared experts", "dense MLP", EMBEDDINGS})
"""Parts that tensor parallelism divides among GPUs; the others are whole on each."""


def lay_out(model: Model, request: Request) -> Plan:
    """The plan, fitting or not: `shortages` is empty.

    Raises:
        ValueError: the configuration lacks a size, or the profile does not fit the model.
    """
    config, cpu, gpus = model.config, request.cpu, request.gpus
    if gpus:
        cache = sglang_cache(config, request.context, request.chunk, request.requests)
        fixed = _gpu_parts(model, request, cache)
        hot = choose_hot(model, request, sum(p.nbytes for p in fixed if p.place == GPU))
        share = hot_share(model, hot, len(gpus))
        name = f"routed experts, {model.gpu_format}"
        parts = [MemoryPart(name, GPU, share, _counts(hot)), *fixed]
        tokens = min(request.chunk, request.context)
        decode = predict_decode(model, hot, cpu, gpus, cache)
        prefill = predict_prefill(model, hot, cpu, gpus, tokens, request.stream_memory)
    else:
        cache = transformers_cache(config, request.context)
        hot = (
            HotExperts(request.slots, "as given")
            if request.slots
            else first_ids(model, 0, "no GPU")
        )
        parts = [*_slot_parts(model, hot), *_cpu_parts(model, request, cache)]
        decode = cpu_only.predict_decode(model, cpu, cache)
        prefill = cpu_only.predict_prefill(model, cpu, min(request.chunk, request.context))
    parts = [*_expert_parts(model, request, hot), *parts]
    return Plan(
        model=model,
        request=request,
        parts=tuple(part for part in parts if part.nbytes),
        hot=hot,
        cache=cache,
        decode=decode,
        prefill=prefill,
        shortages=(),
        notes=tuple(_notes(model, request)),
    )


def slots_of(model: Model, gpu_experts: Any) -> dict[int, int]:
    """How many experts of each layer are in slots, as `from_pretrained` splits them.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `hot_masks`.
    """
    layers = [
        LayerOfExperts(layer.layer, layer.num_experts, layer.packed + layer.bias)
        for layer in model.layers
    ]
    masks = hot_masks(gpu_experts, layers, num_layers(model))
    return {layer: int(mask.sum()) for layer, mask in masks.items()}


def _slot_parts(model: Model, hot: HotExperts) -> list[MemoryPart]:
    """Experts in slots without a GPU."""
    slots = sum(hot.counts[layer.layer] * (layer.packed + layer.bias) for layer in model.layers)
    return [MemoryPart("routed experts, slots", RAM, slots, f"{_counts(hot)}; computed by torch")]


def _expert_parts(model: Model, request: Request, hot: HotExperts) -> list[MemoryPart]:
    """The experts on the CPU: one arena for each layer and pool. With slots it has a place to
    spare, so that an expert can come back before another leaves."""
    strips: Counter[str] = Counter()
    rounding = biases = spare = 0
    for layer in model.layers:
        cold = hot.cold(layer)
        more = int(request.slots is not None and 0 < cold < layer.num_experts)
        strips[layer.formats.name] += cold * layer.packed
        biases += cold * layer.bias
        spare += more * (layer.packed + layer.bias)
        if request.huge_pages and cold:  # each pool's share is rounded; shares are nearly equal
            share = (cold + more) * (layer.packed + layer.bias) / request.pools
            rounding += round(request.pools * (-share % HUGE_PAGE))
    return [
        *(
            MemoryPart(f"{CPU_EXPERTS}, {name}", RAM, nbytes, "strips, as large as stored")
            for name, nbytes in strips.items()
        ),
        MemoryPart(f"{CPU_EXPERTS}, biases", RAM, biases, "float32"),
        MemoryPart(f"{CPU_EXPERTS}, spare places", RAM, spare, "one in each layer with slots"),
        MemoryPart(f"{CPU_EXPERTS}, page rounding", RAM, rounding, "huge pages of 2 MiB"),
    ]


def _gpu_parts(model: Model, request: Request, cache: KvCache) -> list[MemoryPart]:
    """Everything but routed experts, on each GPU and in RAM, under SGLang."""
    gpus = len(request.gpus)
    parts = []
    for name, nbytes in model.parts.items():
        if name == DRAFT:
            parts.append(MemoryPart(name, NOWHERE, nbytes, "only for speculative decoding"))
        elif name in DIVIDED and gpus > 1:
            parts.append(
                MemoryPart(name, GPU, -(-nbytes // gpus), f"1/{gpus} of {format_bytes(nbytes)}")
            )
        else:
            parts.append(MemoryPart(name, GPU, nbytes))
    mla = kind_of(model.config) in ("mla", "deepseek_v4")
    reserve = scratch.gpu_reserve(request.chunk, request.requests, gpus, mla=mla)
    runtime = scratch.SGLANG_RAM + gpus * scratch.SGLANG_RAM_PER_GPU
    buffers = scratch.stream_buffers(model, request.chunk, request.threads, request.pools)
    return [
        *parts,
        MemoryPart("KV cache", GPU, cache.per_gpu(gpus), cache.formula),
        MemoryPart("activations, graphs", GPU, reserve, "SGLang's own rule", assumed=True),
        MemoryPart("streamed prefill", GPU, request.stream_memory, "as given"),
        MemoryPart("CUDA context", GPU, scratch.GPU_CONTEXT, "1 GiB", assumed=True),
        MemoryPart("buffers of the CPU experts", RAM, buffers, f"chunks of {request.chunk} tokens"),
        MemoryPart("SGLang's processes", RAM, runtime, "4 GiB and 2 GiB per GPU", assumed=True),
    ]


def _cpu_parts(model: Model, request: Request, cache: KvCache) -> list[MemoryPart]:
    """Everything but the experts, in RAM, under Transformers."""
    buffers = scratch.cpu_buffers(model, request.context, request.threads, request.pools)
    activations = scratch.cpu_activations(model, request.context)
    return [
        *_dense_parts(model.dense, request),
        MemoryPart(_REST, RAM, model.torch_bytes, "held by torch, in 16 bits or more"),
        MemoryPart(DRAFT, NOWHERE, model.parts.get(DRAFT, 0), "only for speculative decoding"),
        MemoryPart("KV cache", RAM, cache.per_gpu(), cache.formula),
        MemoryPart("KV cache, growing", RAM, _grown(cache), "one layer in its old and new place"),
        MemoryPart("buffers of the CPU experts", RAM, buffers, "batches are cut at 2048 tokens"),
        MemoryPart("activations", RAM, activations, "16 x context x H x 2 B", assumed=True),
        MemoryPart("Python, torch", RAM, scratch.TRANSFORMERS_RAM, "1 GiB", assumed=True),
    ]


def _grown(cache: KvCache) -> int:
    """Bytes of the largest layer of a cache: it has two places while it is copied into larger ones.
    Room that is not written yet is not resident."""
    return max((round(row.tokens * row.nbytes) for row in cache.rows if row.layers), default=0)


def _dense_parts(dense: DenseLayers, request: Request) -> list[MemoryPart]:
    """Linear layers in strips: one arena for each layer and pool, and for each MLP."""
    if dense.fmt is None:
        return []
    rounding = 0
    if request.huge_pages:
        shares = (nbytes / request.pools for nbytes in dense.arenas)
        rounding = round(request.pools * sum(-share % HUGE_PAGE for share in shares))
    name = f"linear layers, {dense.fmt.name}"
    return [
        MemoryPart(name, RAM, sum(dense.arenas), "strips, rows in steps of 64"),
        MemoryPart("linear layers, biases", RAM, dense.biases, "float32, also where there is none"),
        MemoryPart("linear layers, page rounding", RAM, rounding, "huge pages of 2 MiB"),
    ]


def _counts(hot: HotExperts) -> str:
    counts = set(hot.counts.values())
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"{number} per layer; {hot.rule}"


def _notes(model: Model, request: Request) -> list[str]:
    notes = []
    if request.gpus and not model.hot_possible:
        notes.append(
            f"{model.base} was written by `hybrid-moe convert`, whose experts SGLang cannot put on "
            "a GPU: give the original checkpoint as --base to use GPU experts, or let this package "
            "have them (--gpu-backend cute)"
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
        if request.slots:
            notes.append(
                "speeds are those of the CPU's kernels alone: without a GPU torch computes experts "
                "in slots, slowly, to try how a model is split"
            )
    return notes
