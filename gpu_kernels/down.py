"""The second grouped GEMM: `down`.

y = W_down h + b_down        float32, a row for each pair of the tiles; not yet weighted
"""

import functools
from typing import Any

import torch

from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles, check_tensor
from hybrid_moe.gpu_kernels.fragments import unpermute
from hybrid_moe.gpu_kernels.gemm_config import GemmConfig, gemm_config
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.strip_gemm import gemm_arguments, strip_gemm
from hybrid_moe.gpu_kernels.toolchain.launching import has_pdl, launch

Tensor = torch.Tensor

TABLE_COLUMNS = 2


def _kernel(config: GemmConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64

    def four(kind: Any, address: Any) -> Any:
        place = cute.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=16)
        return cute.make_tensor(place, cute.make_layout(4))

    class Rows:
        halves_meet = False
        table_columns = TABLE_COLUMNS
        early_weights = True

        @cute.jit
        def store(
            self,
            c: cute.Tensor,
            pairs: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            entry: cute.Pointer,
            strip: Int32,
            a: Int32,
            t: Int32,
            row_columns: Int32,
        ) -> None:
            """y in rows 4t .. 4t + 3 of half a, for two pairs. c[2 r + e, i] is row 4t + 2 i + r of
            pair e. A half is whole or beyond the last row, since H is a multiple of 32."""
            column = strip * STRIP_ROWS + a * (STRIP_ROWS // 2) + 4 * t
            if column < row_columns:
                bias = cute.make_rmem_tensor(cute.make_layout(4), Float32)
                bias.fill(0.0)
                if cutlass.const_expr(config.biases):
                    line = cute.make_tensor(entry + 1, cute.make_layout(1))[0]
                    at = base + Int64(line) * Int64(64) + Int64(128 * a + 16 * t)
                    cute.autovec_copy(four(Float32, at), bias)
                for e in cutlass.range_constexpr(2):
                    if pairs[e] >= 0:
                        y = cute.make_rmem_tensor(cute.make_layout(4), Float32)
                        for i in cutlass.range_constexpr(4):
                            y[i] = c[2 * (i % 2) + e, i // 2]
                            if cutlass.const_expr(config.biases):
                                y[i] = y[i] + bias[i]
                        place = Int64(pairs[e]) * Int64(row_columns) + Int64(column)
                        cute.autovec_copy(y, four(Float32, out.toint() + place * Int64(4)))

    return strip_gemm(config, Rows())


def definition(config: GemmConfig) -> KernelDefinition:
    """The kernel of one configuration. Its grid is `GemmConfig.grid`."""
    return KernelDefinition(
        "down", config, _kernel, gemm_arguments("f32"), config.threads, config.shared_bytes
    )


@functools.lru_cache(maxsize=256)
def _chosen(format: str, K: int, tile: int, biases: bool, pdl: bool) -> KernelDefinition:
    return definition(gemm_config(format, K, tile, biases=biases, pdl=pdl))


def choose(layout: SlotLayout, tile: int, *, pdl: bool = False) -> KernelDefinition:
    """The kernel for experts of this layout and tiles of `tile` pairs."""
    return _chosen(layout.formats.down.name, layout.intermediate, tile, layout.biases, pdl)


def _check(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> int:
    """Raise as `down` does; the number of strips."""
    check_tensor("h", h, torch.bfloat16, (h.shape[0], layout.intermediate), h.device)
    strips = -(-layout.hidden // STRIP_ROWS)
    tiles.check(layout, TABLE_COLUMNS, strips, h)
    return strips


def down_ref(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    """`down` in torch: float32, any device. Rows of pairs in no tile are zero."""
    _check(layout, tiles, h)
    inputs = unpermute(h, layout.formats.down).float()
    y = h.new_zeros(h.shape[0], layout.hidden, dtype=torch.float32)
    for pairs, weights in tiles.pairs_by_slot(layout):
        y[pairs] = inputs[pairs] @ weights.down.T
        if weights.down_bias is not None:
            y[pairs] += weights.down_bias
    return y


def down(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    """The down projection of every pair: y, float32 [T * k, H], not yet weighted. Rows of pairs in
    no tile are undefined.

    Args:
        layout: of a slot.
        tiles: from `pack`, with `down_table`.
        h: bf16 [T * k, I] in `k_order`, from `gate_up`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
        NotImplementedError: on a GPU, a format that has no kernels.
    """
    if h.device.type != "cuda":
        return down_ref(layout, tiles, h)
    strips = _check(layout, tiles, h)
    pdl = has_pdl(h.device)
    kernel = choose(layout, tiles.tile, pdl=pdl)
    y = h.new_empty(h.shape[0], layout.hidden, dtype=torch.float32)
    scalars = layout.nbytes, layout.intermediate, strips, layout.hidden, 1
    grid = kernel.config.grid(strips, len(tiles.tile_slot))
    launch(kernel, (*tiles.pointers(h), y, *scalars), grid, pdl=pdl)
    return y
