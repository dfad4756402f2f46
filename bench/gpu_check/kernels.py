"""Each kernel over tokens, models and formats, as a share of its ceiling.

    python -m bench.gpu_check.kernels [--points FILE] [--seconds 120]

The ceiling of a point is the longer of two times: its bytes at the rate of a copy, its products at
the rate of `mma.sync`. Bytes are those that must move once: weights of the experts in use,
activations in and out. Points with few tokens come first, so that a run that is cut short has them.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_check.baselines import Baselines
from bench.gpu_check.ceilings import copy_rate, mma_flops
from bench.gpu_check.clock import device, on_gpu, time_us
from bench.gpu_check.points import Points
from bench.gpu_check.workload import (
    FORMATS,
    REHEARSED_TOKENS,
    TOKENS,
    Batch,
    Model,
    models,
    random_batches,
    random_slots,
)
from hybrid_moe.gpu_kernels.combine import combine
from hybrid_moe.gpu_kernels.down import down
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.gate_up import gate_up
from hybrid_moe.gpu_kernels.gemm_config import token_tile
from hybrid_moe.gpu_kernels.pack_tokens import pack
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.toolchain import availability

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layer:
    """A model's experts in slots on the device."""

    model: Model
    layout: SlotLayout
    memory: Tensor
    slot_of: Tensor
    wide: Tensor
    tables: tuple[Tensor, Tensor]

    @staticmethod
    def random(model: Model, fmt: str) -> Layer:
        layout = model.layout(fmt)
        tables = (
            torch.from_numpy(layout.gate_up_table).to(device()),
            torch.from_numpy(layout.down_table).to(device()),
        )
        return Layer(
            model,
            layout,
            random_slots(layout, model.experts, device()),
            torch.arange(model.experts, dtype=torch.int32, device=device()),
            torch.zeros(model.experts, dtype=torch.int32, device=device()),
            tables,
        )

    def stages(self, batch: Batch) -> dict[str, Callable[[], object]]:
        """The four kernels on a batch, each with the inputs that the ones before have made."""
        tile = token_tile(batch.ids.numel(), self.model.experts)
        packs = functools.partial(
            pack, batch.x, batch.ids, self.slot_of, fmt=self.layout.formats.gate_up,
            slots=self.model.experts, tile=tile,
        )  # fmt: skip
        packed = packs()
        tiles = ExpertTiles(self.memory, self.tables[0], self.wide, *packed[1:])
        gates = functools.partial(
            gate_up, self.layout, self.model.activation, tiles, packed.xp, self.model.top_k
        )
        h = gates()
        downs = functools.partial(down, self.layout, replace(tiles, table=self.tables[1]), h)
        y = downs()
        combines = functools.partial(combine, y, batch.ids, batch.weights, self.slot_of)
        return {"pack": packs, "gate_up": gates, "down": downs, "combine": combines}

    def work(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """Kernel -> (bytes that must move, floating-point operations)."""
        model, (share,) = self.model, self.layout.shares
        (T, H), I, pairs = batch.x.shape, model.intermediate, batch.ids.numel()
        distinct, strips = batch.distinct, share.down_offset
        other = self.layout.nbytes - strips
        return {
            "pack": (4 * T * H + 8 * pairs, 0),
            "gate_up": (distinct * strips + 2 * T * H + 2 * pairs * I, 4.0 * pairs * H * I),
            "down": (distinct * other + 2 * pairs * I + 4 * pairs * H, 2.0 * pairs * H * I),
            "combine": (4 * pairs * H + 2 * T * H, 2.0 * pairs * H),
        }


def share_of_ceiling(us: float | None, nbytes: float, flops: float) -> tuple[str, float | None]:
    """Which ceiling is the lower one, and how near to it `us` is."""
    copy, mma = copy_rate(), mma_flops()
    if us is None or copy is None or mma is None:
        return "", None
    memory_us, math_us = 1e6 * nbytes / copy, 1e6 * flops / mma
    return ("copy", memory_us / us) if memory_us >= math_us else ("mma", math_us / us)


def measured(layer: Layer, beside: Baselines, batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    """A point of each kernel, and of the baselines of both GEMMs together."""
    model, tokens = layer.model, len(batches[0].x)
    stages = [layer.stages(batch) for batch in batches]
    about = {"model": model.name, "format": layer.layout.formats.name, "tokens": tokens}
    for name in stages[0]:
        us = time_us([stage[name] for stage in stages])
        works = [layer.work(batch)[name] for batch in batches]
        nbytes, flops = (sum(column) / len(works) for column in zip(*works, strict=True))
        ceiling, share = share_of_ceiling(us, nbytes, flops)
        yield {
            **about, "kernel": name, "us": us, "bytes": nbytes, "flops": flops,
            "ceiling": ceiling, "share": share,
        }  # fmt: skip
    for name, us in beside.measured(batches).items():
        yield {**about, "kernel": name, "us": us, "ceiling": "", "share": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", help="write JSON lines there")
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    if on_gpu() and not availability().usable:
        raise SystemExit(f"the kernels do not run here: {availability().reason}")
    points, end = Points(args.points), time.monotonic() + args.seconds
    wanted = [(model, fmt) for fmt in FORMATS for model in models(rehearsal=not on_gpu())]
    left_out = 0
    for model, fmt in wanted:
        layer = Layer.random(model, fmt)
        beside = Baselines(layer.layout, model, layer.memory)
        # what is left of the time is shared by the layers that are left
        share_s = (end - time.monotonic()) / (len(wanted) - wanted.index((model, fmt)))
        stop = time.monotonic() + share_s
        for tokens in TOKENS if on_gpu() else REHEARSED_TOKENS:
            if time.monotonic() > stop:
                left_out += 1
                continue
            for point in measured(layer, beside, random_batches(model, tokens, device())):
                points.add("kernels", **point)
        del layer, beside
    note = f"; no time for {left_out} batches" if left_out else ""
    print(("kernels measured" if on_gpu() else "rehearsed: not measured without a GPU") + note)


if __name__ == "__main__":
    main()
