"""Every kernel once on small shapes, compared with its reference: what the sanitizers watch.

compute-sanitizer --tool memcheck python -m bench.gpu_check.small_shapes
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu_check.clock import device, on_gpu
from bench.gpu_check.kernels import Layer
from bench.gpu_check.workload import FORMATS, Batch, models, random_batches
from hybrid_moe.gpu_kernels import act_quant, gating_soft, gating_switch, gating_topk
from hybrid_moe.gpu_kernels import weight_dequant as dequant
from hybrid_moe.gpu_kernels.combine import combine_ref
from hybrid_moe.gpu_kernels.down import down_ref
from hybrid_moe.gpu_kernels.gate_up import gate_up_ref
from hybrid_moe.gpu_kernels.gating import Gating
from hybrid_moe.gpu_kernels.pack_tokens import pack_ref

Tensor = torch.Tensor

BOUND = 0.0040
"""Of ||kernel - reference|| / ||reference||: h is rounded to bf16 from sums in another order."""


def experts() -> int:
    """The four kernels, for few and for many tokens; how many comparisons."""
    count = 0
    for model in models(rehearsal=True):
        for fmt in FORMATS:
            layer = Layer.random(model, fmt)
            for tokens in (1, 5, 80):
                batch = random_batches(model, tokens, device())[0]
                stages = layer.stages(batch)
                found = stages["combine"]()
                assert isinstance(found, Tensor)
                compare(f"{model.name} {fmt} {tokens}", found, reference(layer, batch), BOUND)
                count += 1
    return count


def reference(layer: Layer, batch: Batch) -> Tensor:
    """The same by the references, on the device."""
    from dataclasses import replace

    from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles

    model = layer.model
    fmt = layer.layout.formats.gate_up
    packed = pack_ref(batch.x, batch.ids, layer.slot_of, fmt=fmt, slots=model.experts, tile=8)
    tiles = ExpertTiles(layer.memory, layer.tables[0], layer.wide, *packed[1:])
    h = gate_up_ref(layer.layout, model.activation, tiles, packed.xp, model.top_k)
    y = down_ref(layer.layout, replace(tiles, table=layer.tables[1]), h)
    return combine_ref(y, batch.ids, batch.weights, layer.slot_of)


def compare(what: str, found: Tensor, wanted: Tensor, bound: float) -> None:
    """Raise SystemExit where they differ by more."""
    a, b = found.float(), wanted.float()
    error = float((a - b).norm() / b.norm().clamp_min(1e-30))
    if not error <= bound:
        raise SystemExit(f"{what}: differs by {error:.4g} of its size, at most {bound}")


def others() -> int:
    """Gating and FP8."""
    torch.manual_seed(0)
    logits = torch.randn((33, 64), device=device())
    batched = torch.randn((2, 40, 8), device=device())
    x = torch.randn((9, 264), device=device()).bfloat16()
    codes = torch.randint(0, 120, (130, 200), dtype=torch.uint8, device=device())
    scales = torch.rand((2, 2), device=device())
    rule = Gating("qwen3", 8, renormalise=True)
    pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("gating_topk", lambda: gating_topk.gating_topk(logits, rule),
         lambda: gating_topk.gating_topk_ref(logits, rule)),
        ("gating_switch", lambda: vars(gating_switch.gating_switch(batched, 6)).values(),
         lambda: vars(gating_switch.gating_switch_ref(batched, 6)).values()),
        ("gating_soft", lambda: vars(gating_soft.gating_soft(batched)).values(),
         lambda: vars(gating_soft.gating_soft_ref(batched)).values()),
        ("act_quant", lambda: act_quant.act_quant(x, "ue8m0"),
         lambda: act_quant.act_quant_ref(x, "ue8m0")),
        ("weight_dequant", lambda: (dequant.weight_dequant(codes, scales),),
         lambda: (dequant.weight_dequant_ref(codes, scales),)),
    ]  # fmt: skip
    for name, run, run_reference in pairs:
        for found, wanted in zip(run(), run_reference(), strict=True):  # type: ignore[call-overload]
            compare(name, found, wanted, 1e-5)
    return len(pairs)


def main() -> None:
    total = experts() + others()
    if on_gpu():
        torch.cuda.synchronize()
    print(f"{total} kernels agree with their references" + ("" if on_gpu() else " (rehearsed)"))


if __name__ == "__main__":
    main()
