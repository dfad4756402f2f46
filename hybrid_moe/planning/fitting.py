"""Whether a plan fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.planning.budget_curve import budget_curve
from hybrid_moe.planning.model import Model
from hybrid_moe.planning.parts import lay_out
from hybrid_moe.planning.plan import CPU_EXPERTS, GPU, RAM, Plan, Request, Shortage
from hybrid_moe.text import format_bytes

_CONTEXT_STEP = 1024


def make_plan(model: Model, request: Request) -> Plan:
    """Plan `model` on the machine of `request`. What does not fit is in `Plan.shortages`.

    Raises:
        ValueError: the configuration lacks a size, or the profile does not fit the model.
    """
    plan = lay_out(model, request)
    shortages = []
    if request.gpus and plan.nbytes(GPU) > request.room:
        shortages.append(_gpu_shortage(plan))
    if plan.nbytes(RAM) > request.ram:
        shortages.append(_ram_shortage(plan))
    routing = request.routing
    curve = () if routing is None else budget_curve(plan, routing)
    return replace(plan, shortages=tuple(shortages), curve=curve)


def _gpu_shortage(plan: Plan) -> Shortage:
    request, model = plan.request, plan.model
    room, needed = request.room, plan.nbytes(GPU)
    advice = []
    if plan.hot.most:
        bare = replace(request, num_gpu_experts=None, profile=None, routing=None)
        count = lay_out(model, bare).hot.most
        if _fits_gpu(model, replace(bare, num_gpu_experts=count)):
            advice.append(f"fewer experts on the GPU ({count} per layer fit)")
    least = replace(request, num_gpu_experts=0, profile=None, routing=None)
    context = _largest_context(lambda n: _fits_gpu(model, replace(least, context=n)), request)
    if context:
        advice.append(f"a smaller context (--context {context} fits)")
    if request.chunk > 2048 and _fits_gpu(model, replace(least, chunk=2048)):
        advice.append("smaller chunks (--chunk 2048 fits)")
    for more in (2, 4, 8):
        gpus = request.gpus[:1] * more
        if more > len(request.gpus) and _fits_gpu(model, replace(least, gpus=gpus)):
            advice.append(f"{more} such GPUs (--gpu {more}x{room / (1 << 30):g}GB)")
            break
    if not advice:
        fixed = lay_out(model, least).nbytes(GPU)
        advice.append(f"a GPU of {format_bytes(fixed)} or more; or the CPU alone, without --gpu")
    return Shortage(f"GPU memory ({format_bytes(room)} each)", needed, room, tuple(advice))


def _ram_shortage(plan: Plan) -> Shortage:
    request, model = plan.request, plan.model
    needed = plan.nbytes(RAM)
    advice = []
    if BF16 in model.formats:
        panels = sum(p.nbytes for p in plan.parts if p.name == f"{CPU_EXPERTS}, {BF16.name}")
        saved = round(panels * (1 - MXFP4.bits_per_weight / BF16.bits_per_weight))
        fits = "fits then" if needed - saved <= request.ram else "still too much"
        advice.append(
            f"MXFP4 experts (--method MXFP4: {format_bytes(needed - saved)} in all, {fits})"
        )
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
        if plan.hot.most + more < model.num_experts:
            on_gpu = format_bytes(more * sum(layer.on_gpu for layer in model.layers))
            advice.append(
                f"{more} more experts of each layer on GPUs, {on_gpu} more of their memory"
            )
    advice.append(f"{format_bytes(needed)} of memory or more")
    return Shortage("memory", needed, request.ram, tuple(advice))


def _fits_gpu(model: Model, request: Request) -> bool:
    return lay_out(model, request).nbytes(GPU) <= request.room


def _fits_ram(model: Model, request: Request) -> bool:
    return lay_out(model, request).nbytes(RAM) <= request.ram


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
