"""Compile what the benchmark launches, in as many processes as there are cores: here, or for a GPU
elsewhere whose machine has no CuTe DSL and is given the cache.

    python -m bench.gpu_check.compile [--arch sm_90]
"""

from __future__ import annotations

import argparse
import time

from bench.gpu_check import mma_rate
from bench.gpu_check.clock import on_gpu
from bench.gpu_check.workload import FORMATS, Model, models
from hybrid_moe.gpu_kernels import combine, down, gate_up, pack_few, pack_many
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.gemm_config import TOKEN_TILES
from hybrid_moe.gpu_kernels.pack_parts import PackConfig, piece_order
from hybrid_moe.gpu_kernels.toolchain import compiled, warm


def definitions(model: Model, fmt: str, pdl: bool) -> list[KernelDefinition]:
    """The four kernels of a layer, for every size of a batch; ids are int64."""
    layout, found = model.layout(fmt), []
    for tile in TOKEN_TILES:
        pack = PackConfig(piece_order(layout.formats.gate_up), tile, True, pdl)
        found += [pack_few.pack_few(pack), pack_many.pack_count(pack)]
        found += [pack_many.pack_scan(pack), pack_many.pack_scatter(pack)]
        found.append(gate_up.choose(layout, model.activation, tile, pdl=pdl))
        found.append(down.choose(layout, tile, pdl=pdl))
    for cold in (False, True):
        config = combine.CombineConfig(model.top_k, True, cold, pdl=pdl)
        found.append(combine.combine_definition(config))
    return found


def wanted(pdl: bool, small: bool) -> list[KernelDefinition]:
    """Of all models and formats, and the ceiling's."""
    found = [mma_rate.definition(mma_rate.MmaRateConfig())]
    for model in models(rehearsal=small):
        for fmt in FORMATS:
            found += definitions(model, fmt, pdl)
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", help="the GPU's; without a GPU, one kernel for each of all")
    args = parser.parse_args()
    begin = time.monotonic()
    if args.arch or on_gpu():
        from hybrid_moe.gpu_kernels.toolchain.launching import device_architecture

        arch = args.arch or device_architecture(0)
        kernels = wanted(pdl=int(arch.removeprefix("sm_")) >= 90, small=False)
        warm(kernels, arch)
        print(f"{len(kernels)} kernels for {arch} in {time.monotonic() - begin:.0f} s")
        return
    rate = compiled(mma_rate.definition(mma_rate.MmaRateConfig()), "sm_90")
    print(
        f"rehearsed: the ceiling's kernel has {rate.ptx.count('mma.sync')} mma, "
        f"{rate.resources.registers} registers; of {len(wanted(True, False))} kernels no other"
    )


if __name__ == "__main__":
    main()
