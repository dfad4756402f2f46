"""All kernels as models use them, and what each must compile to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_moe.formats.strips import GROUP, strip_layout
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.gpu_kernels import (
    act_quant,
    combine,
    down,
    gate_up,
    gating_soft,
    gating_switch,
    gating_topk,
    pack_few,
    pack_many,
    weight_dequant,
)
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.gating import Gating
from hybrid_moe.gpu_kernels.gemm_config import ROW_TILES, TOKEN_TILES, GemmConfig, gemm_config
from hybrid_moe.gpu_kernels.pack_parts import PackConfig, piece_order
from hybrid_moe.gpu_kernels.weight_codes.objects import strip_codes


@dataclass(frozen=True)
class Expected:
    """Of a kernel's code.

    Attributes:
        registers: most of a thread.
        mma: `mma.m16n8k16` in its text.
        wide_loads: loads of 16 bytes from global memory, at least.
        copies: asynchronous ones, to shared memory, at least; 0 for none.
    """

    registers: int
    mma: int = 0
    wide_loads: int = 0
    copies: int = 0


def small_kernels(pdl: bool = False) -> dict[str, tuple[KernelDefinition, Expected]]:
    """Kernels around the grouped GEMMs."""
    bf16 = torch.bfloat16
    four = PackConfig(piece_order(DENSE_FORMATS["MXFP4"]), 8, wide_ids=True, pdl=pdl)
    sixteen = PackConfig(piece_order(DENSE_FORMATS["BF16"]), 8, wide_ids=False, pdl=pdl)
    gating = {
        "qwen3": (Gating("qwen3", 8, renormalise=True), 128, None),
        "gpt_oss": (Gating("gpt_oss", 4), 128, None),
        "deepseek_v3": (Gating("deepseek_v3", 8, True, 2.5, 8, 4), 256, torch.float32),
    }
    return {
        "pack_few, MXFP4": (pack_few.pack_few(four), Expected(40, wide_loads=1)),
        "pack_few, BF16": (pack_few.pack_few(sixteen), Expected(40, wide_loads=4)),
        "pack_count": (pack_many.pack_count(four), Expected(40, wide_loads=1)),
        "pack_scan": (pack_many.pack_scan(four), Expected(40)),
        "pack_scatter": (pack_many.pack_scatter(four), Expected(40)),
        "combine": (
            combine.combine_definition(combine.CombineConfig(8, True, cold=True, pdl=pdl)),
            Expected(64, wide_loads=9),  # 8 rows and the CPU's part
        ),
        **{
            f"gating_topk, {name}": (
                gating_topk.definition(gating_topk.choose_config(rule, experts, bf16, 1, bias)),
                Expected(64),
            )
            for name, (rule, experts, bias) in gating.items()
        },
        "gating_switch": (
            gating_switch.definition(gating_switch.SwitchConfig(128)), Expected(40),
        ),
        "gating_soft": (
            gating_soft.definition(gating_soft.SoftConfig(True, "bf16")), Expected(40),
        ),
        "act_quant": (
            act_quant.definition(act_quant.choose_config(4096, bf16, 4096, True)),
            Expected(40, wide_loads=1),
        ),
        "weight_dequant": (
            weight_dequant.definition(weight_dequant.choose_config(4096, bf16)),
            Expected(40, wide_loads=1),
        ),
    }  # fmt: skip


def grouped_gemms(pdl: bool = False) -> dict[str, tuple[KernelDefinition, Expected]]:
    """`gate_up` and `down` of gpt-oss (H = I = 2880, biases, clamp; 2816 with superblocks), every
    format and tile."""
    found = {}
    for fmt in FORMATS:
        K = 2880 // FORMATS[fmt].k_multiple * FORMATS[fmt].k_multiple
        for tile in TOKEN_TILES:
            config = gemm_config(fmt, K, tile, biases=True, pdl=pdl)
            places = gate_up.places_of(FORMATS[fmt])
            activated = gate_up.GateUpConfig(config, 7.0, 1.702, 1.0, places)
            expected = _of_gemm(config)
            found[f"gate_up, {fmt}, {tile}"] = gate_up.definition(activated), expected
            found[f"down, {fmt}, {tile}"] = down.definition(config), expected
    return found


MOST_REGISTERS = {8: 168, 16: 232, 32: 216, 64: 255}
"""Of a thread, by tile, of MXFP4 and BF16."""


def _registers(config: GemmConfig) -> int:
    """An SM has 65536, of which blocks leave this to a thread: a multiple of 8, up to 255."""
    if config.format in ("MXFP4", "BF16"):
        return MOST_REGISTERS[config.tile]
    return min(255, 65536 // (config.resident * config.threads) // 8 * 8)


def _of_gemm(config: GemmConfig) -> Expected:
    """A turn of the loop over K has `depth` groups of 32 inputs, two steps of 16 each, for both row
    tiles of each half and all columns. Formats whose experts may be wide have the loop twice: with
    scales in the codes, and with scales in float32. Formats with offsets add up the activations,
    too, once for all rows. A lane's load brings a word of four rows."""
    fmt = FORMATS[config.format]
    codes = strip_codes(fmt, strip_layout(fmt, max(GROUP, fmt.k_multiple)))
    tiles = config.halves * ROW_TILES + codes.has_offsets
    return Expected(
        _registers(config),
        mma=len(codes.ways) * config.depth * tiles * 2 * config.columns,
        wide_loads=config.depth * config.halves * codes.codes.registers // 4,
        copies=1 if config.staged else 0,
    )
