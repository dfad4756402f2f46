"""The first grouped GEMM with its activation: `gate_up`.

    g = W_gate x + b_gate      u = W_up x + b_up            float32
    h = bf16(SwiGLU(g, u))                                  its clamp, alpha and offset: Activation

for every pair of the tiles; h is written in the `k_order` of `down`, whose input it is.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles, check_tensor
from hybrid_moe.gpu_kernels.fragments import inverse_k_order, permute, unpermute
from hybrid_moe.gpu_kernels.gemm_config import GemmConfig, gemm_config
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.strip_gemm import gemm_arguments, strip_gemm
from hybrid_moe.gpu_kernels.toolchain.launching import has_pdl, launch

Tensor = torch.Tensor

TABLE_COLUMNS = 3


@dataclass(frozen=True)
class GateUpConfig:
    """A `GemmConfig`, `Activation.parameters`, and the order of h.

    Attributes:
        places: of inputs 1, 2, 4, 8 and 16 of a group in the `k_order` of `down`, from which all
            follow: the place of i + j is the sum of theirs where they have no bit in common.
    """

    gemm: GemmConfig
    limit: float
    alpha: float
    offset: float
    places: tuple[int, ...]


def places_of(fmt: WeightFormat) -> tuple[int, ...]:
    """`GateUpConfig.places` for a `down` of this format."""
    place = inverse_k_order(fmt).tolist()
    bits = (1, 2, 4, 8, 16)
    if any(place[i] + place[j] != place[i + j] for i in bits for j in range(i)):
        raise AssertionError("k_order does not permute the bits of a place")
    return tuple(place[i] for i in bits)


def _kernel(config: GateUpConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64

    place = {0: 0, **{1 << bit: at for bit, at in enumerate(config.places)}}

    def sigmoid(x: Any) -> Any:
        return cute.arch.rcp_approx(Float32(1.0) + cute.math.exp(-x, fastmath=True))

    class SwiGlu:
        halves_meet = True
        table_columns = TABLE_COLUMNS
        early_weights = False

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
            """h of columns 4t + 2a and 4t + 2a + 1 of a strip, for two pairs. c[2 r + e, 0] is gate
            and c[2 r + e, 1] up of column r and pair e."""
            if cutlass.const_expr(config.gemm.biases):
                for side in cutlass.range_constexpr(2):
                    line = cute.make_tensor(entry + (1 + side), cute.make_layout(1))[0]
                    at = base + Int64(line) * Int64(64) + Int64(16 * t + 8 * a)
                    bias = cute.make_rmem_tensor(cute.make_layout(2), Float32)
                    source = cute.make_ptr(Float32, at, cute.AddressSpace.gmem, assumed_align=8)
                    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(2)), bias)
                    for i in cutlass.range_constexpr(4):
                        c[i, side] = c[i, side] + bias[i // 2]
            first = Int64(strip * GROUP + a * place[2])
            first += Int64((t & 1) * place[4] + ((t >> 1) & 1) * place[8] + (t >> 2) * place[16])
            for e in cutlass.range_constexpr(2):
                if pairs[e] >= 0:
                    row = out + (Int64(pairs[e]) * Int64(row_columns) + first)
                    for r in cutlass.range_constexpr(2):
                        g, u = c[2 * r + e, 0], c[2 * r + e, 1]
                        if cutlass.const_expr(config.limit < math.inf):
                            g = cute.arch.fmin(g, config.limit, nan=True)
                            u = cute.arch.fmin(u, config.limit, nan=True)
                            u = cute.arch.fmax(u, -config.limit, nan=True)
                        h = g * sigmoid(config.alpha * g) * (u + config.offset)
                        cute.make_tensor(row + place[r], cute.make_layout(1))[0] = BFloat16(h)

    return strip_gemm(config.gemm, SwiGlu())


def definition(config: GateUpConfig) -> KernelDefinition:
    """The kernel of one configuration. Its grid is `GemmConfig.grid`."""
    gemm = config.gemm
    return KernelDefinition(
        "gate_up", config, _kernel, gemm_arguments("bf16"), gemm.threads, gemm.shared_bytes
    )


@functools.lru_cache(maxsize=256)
def _chosen(
    formats: LayerFormats, K: int, tile: int, biases: bool, activation: Activation, pdl: bool
) -> KernelDefinition:
    gemm = gemm_config(formats.gate_up.name, K, tile, biases=biases, pdl=pdl)
    return definition(GateUpConfig(gemm, *activation.parameters, places_of(formats.down)))


def choose(
    layout: SlotLayout, activation: Activation, tile: int, *, pdl: bool = False
) -> KernelDefinition:
    """The kernel for experts of this layout and tiles of `tile` pairs."""
    return _chosen(layout.formats, layout.hidden, tile, layout.biases, activation, pdl)


def _check(layout: SlotLayout, tiles: ExpertTiles, xp: Tensor, k: int) -> int:
    """Raise as `gate_up` does; the number of strips."""
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    check_tensor("xp", xp, torch.bfloat16, (xp.shape[0], layout.hidden), xp.device)
    strips = layout.intermediate // GROUP
    tiles.check(layout, TABLE_COLUMNS, strips, xp)
    return strips


def gate_up_ref(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    """`gate_up` in torch: float32, any device. Rows of pairs in no tile are zero."""
    _check(layout, tiles, xp, k)
    limit, alpha, offset = activation.parameters
    x = unpermute(xp, layout.formats.gate_up).float()
    h = xp.new_zeros(xp.shape[0] * k, layout.intermediate)
    for pairs, weights in tiles.pairs_by_slot(layout):
        tokens = x[pairs // k]
        g, u = tokens @ weights.gate.T, tokens @ weights.up.T
        if weights.gate_bias is not None and weights.up_bias is not None:
            g, u = g + weights.gate_bias, u + weights.up_bias
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        h[pairs] = (g * torch.sigmoid(alpha * g) * (u + offset)).to(h.dtype)
    permuted: Tensor = permute(h, layout.formats.down)
    return permuted


def gate_up(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    """Gate, up and activation of every pair: h, bf16 [T * k, I], in `down`'s `k_order`. Rows of
    pairs in no tile are undefined.

    Args:
        layout: of a slot.
        activation: its limit and alpha are compiled in.
        tiles: from `pack`, with `gate_up_table`.
        xp: bf16 [T, H] in `k_order`.
        k: experts of a token, so that pair p reads row p // k.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
        NotImplementedError: on a GPU, a format that has no kernels.
    """
    if xp.device.type != "cuda":
        return gate_up_ref(layout, activation, tiles, xp, k)
    strips = _check(layout, tiles, xp, k)
    pdl = has_pdl(xp.device)
    kernel = choose(layout, activation, tiles.tile, pdl=pdl)
    h: Tensor = xp.new_empty(xp.shape[0] * k, layout.intermediate)
    scalars = layout.nbytes, layout.hidden, strips, layout.intermediate, k
    grid = kernel.config.gemm.grid(strips, len(tiles.tile_slot))
    launch(kernel, (*tiles.pointers(xp), h, *scalars), grid, pdl=pdl)
    return h
