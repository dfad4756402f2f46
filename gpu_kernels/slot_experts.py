"""The hot experts of one layer: their slots in a device's memory, and what computes with them.

    x, ids ─► pack ─► gate_up ─► down ─► y, a row for each (token, expert) pair
    y, weights, the CPU's part ─► combine ─► out, rounded once

Everything is a fixed tensor of the device, so that a captured graph follows whatever is written
into it in the order of its stream: which expert has which slot (`slot_of`), and the slots' bytes.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels.act_quant import fp8_rounded, fp8_rounded_ref, rounding_kernel
from hybrid_moe.gpu_kernels.combine import combine, combine_launch, combine_ref
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.down import choose as choose_down
from hybrid_moe.gpu_kernels.down import down, down_ref
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.gate_up import choose as choose_gate_up
from hybrid_moe.gpu_kernels.gate_up import gate_up, gate_up_ref
from hybrid_moe.gpu_kernels.gemm_config import TOKEN_TILES, gemm_config, token_tile
from hybrid_moe.gpu_kernels.pack_tokens import (
    ID_DTYPES,
    empty_packed,
    pack,
    pack_launches,
    pack_ref,
)
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.toolchain import has_pdl, prepare
from hybrid_moe.gpu_kernels.weight_codes.objects import check_kernels, needs_wide

Tensor = torch.Tensor

BACKENDS = {
    "cute": (pack, gate_up, down, combine, fp8_rounded),
    "torch": (pack_ref, gate_up_ref, down_ref, combine_ref, fp8_rounded_ref),
}
"""Name -> its functions: kernels of a CUDA device, or their references in torch on any device."""

PREFILL_TOKENS = 256
"""A batch of so many tokens is a prefill, for `fp8_prefill`: more than a batch of requests that
decode, fewer than a chunk of a prompt."""


def check_experts(
    backend: str, formats: WeightFormat | LayerFormats, hidden: int, intermediate: int
) -> None:
    """Raise for experts that a back end cannot compute.

    Raises:
        NotImplementedError: their format. ValueError: H or I is too large for the kernels.
    """
    if backend == "torch":
        return
    formats = layer_formats(formats)
    check_kernels(formats)
    for fmt, name, K in zip(
        formats, ("hidden_size", "moe_intermediate_size"), (hidden, intermediate), strict=True
    ):
        try:
            gemm_config(fmt.name, K, TOKEN_TILES[0], biases=True)
        except ValueError as error:
            raise ValueError(f"{name} is {K}: {error}") from error


def has_wide_scales(formats: WeightFormat | LayerFormats, tensors: ExpertTensors) -> bool:
    """Whether an expert has scales that kernels cannot fold into bf16 weights."""
    first, second = layer_formats(formats)
    matrices = ((first, tensors.gate), (first, tensors.up), (second, tensors.down))
    return any(m.scales is not None and needs_wide(fmt, m.scales) for fmt, m in matrices)


AT_ONCE = 2048
"""Tokens whose rows are kept at a time, as many as a job of the CPU's half has: rows of a token's
8 experts with H = 4096 are 128 KB, 268 MB of 2048 tokens."""


class SlotExperts:
    """See the module.

    Args:
        layout: of a slot.
        activation: between the projections.
        num_experts: E, hot or not.
        slots: S, at least 1.
        device: where they are.
        backend: of `BACKENDS`.
        fp8_prefill: batches of `PREFILL_TOKENS` and more are computed as W8A8 has them: the inputs
            of both projections are rounded to E4M3 with a power of two for 128 of them
            (`fp8_rounded`). The error grows from 0.2 % of the output's size to 4.7 %, of random
            experts (tests/gpu/test_fp8_prefill.py).

    Attributes:
        memory: uint8 [S, nbytes], experts as the CPU has them (`slot_layout`).
        slot_of: int32 [E], the slot of each expert, or -1.
        wide: int32 [S], not 0 where the expert `has_wide_scales`.

    Raises:
        NotImplementedError: the back end has no functions for the format.
        torch.OutOfMemoryError: the device has no room.
    """

    def __init__(
        self,
        layout: SlotLayout,
        activation: Activation,
        num_experts: int,
        slots: int,
        device: torch.device,
        backend: str,
        fp8_prefill: bool = False,
    ) -> None:
        check_experts(backend, layout.formats, layout.hidden, layout.intermediate)
        self.layout, self.activation, self.backend = layout, activation, backend
        self._pack, self._gate_up, self._down, self._combine, self._fp8 = BACKENDS[backend]
        self._fp8_from = PREFILL_TOKENS if fp8_prefill else sys.maxsize
        self.memory = torch.empty((slots, layout.nbytes), dtype=torch.uint8, device=device)
        self.slot_of = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        self.wide = torch.zeros(slots, dtype=torch.int32, device=device)
        self._gate_up_table = torch.from_numpy(layout.gate_up_table).to(device)
        self._down_table = torch.from_numpy(layout.down_table).to(device)

    @property
    def slots(self) -> int:
        """S."""
        return self.memory.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.memory.numel()

    @property
    def small_tensors(self) -> tuple[Tensor, ...]:
        """All but the slots: what kernels read although no expert has a slot."""
        return self.slot_of, self.wide, self._gate_up_table, self._down_table

    def kernels(self, k: int, *, pdl: bool) -> list[KernelDefinition]:
        """What any batch with k experts per token may launch."""
        layout, found = self.layout, dict[KernelDefinition, None]()
        x = self.memory.new_zeros((1, layout.hidden), dtype=torch.bfloat16)
        y, weights = x.new_zeros((k, layout.hidden), dtype=torch.float32), x.new_zeros((1, k))
        for id_type in ID_DTYPES:
            ids = x.new_full((1, k), -1, dtype=id_type)
            for tile in TOKEN_TILES:
                packed = empty_packed(x, k, self.slots, tile)
                for few in (True, False):
                    launches = pack_launches(
                        x, ids, self.slot_of, packed, fmt=layout.formats.gate_up, few=few, pdl=pdl
                    )
                    found.update((launch.definition, None) for launch in launches)
            for cold, out in ((None, x), (y[:1], x), (None, y[:1])):
                launch = combine_launch(y, ids, weights, self.slot_of, cold, out, pdl=pdl)
                found[launch.definition] = None
        if self._fp8_from < sys.maxsize:
            for inputs in (layout.hidden, layout.intermediate):
                for tokens in (self._fp8_from, 1 << 20):
                    found[rounding_kernel(inputs, x.dtype, tokens)] = None
        for tile in TOKEN_TILES:
            found[choose_gate_up(layout, self.activation, tile, pdl=pdl)] = None
            found[choose_down(layout, tile, pdl=pdl)] = None
        return list(found)

    def prepare(self, k: int) -> None:
        """Compile and load the kernels, so that none has to be while a graph is captured."""
        if self.backend == "cute":
            device = self.memory.device
            prepare(self.kernels(k, pdl=has_pdl(device)), device)

    def ranges(self, whole: Tensor) -> list[Tensor]:
        """The pools' ranges of a slot's bytes, uint8 [nbytes]: views."""
        places = zip(self.layout.share_offsets, self.layout.shares, strict=True)
        return [whole[at : at + share.nbytes] for at, share in places]

    def rows(self, x: Tensor, ids: Tensor) -> Tensor:
        """What each pair of a hot expert gives, not yet weighted: y, float32 [T * k, H]. Rows of
        other pairs are undefined.

        Args:
            x: bf16 [T, H], contiguous. ids: int32 or int64 [T, k], contiguous; ids out of range
                are nobody's.
        """
        return self._rows(x, ids, fp8=len(ids) >= self._fp8_from)

    def sums(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The hot pairs of each token by id, weighted and added up: float32 [T, H], to which
        nothing but the CPU's part is missing. For many tokens: `rows` keeps 4 H bytes of every
        pair, this of `AT_ONCE` tokens at a time.

        Args:
            x: bf16 [T, H]. ids: [T, k]. weights: float32 [T, k]. As for `rows`.
        """
        total = x.new_empty((len(ids), self.layout.hidden), dtype=torch.float32)
        for first in range(0, len(ids), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            y = self._rows(x[part], ids[part], fp8=len(ids) >= self._fp8_from)
            total[part] = self._combine(y, ids[part], weights[part], self.slot_of, rounded=False)
        return total

    def _rows(self, x: Tensor, ids: Tensor, *, fp8: bool) -> Tensor:
        layout, (tokens, k) = self.layout, ids.shape
        if not tokens:
            return x.new_empty((0, layout.hidden), dtype=torch.float32)
        x = self._fp8(x) if fp8 else x
        tile = token_tile(ids.numel(), len(self.slot_of))
        fmt = layout.formats.gate_up
        packed = self._pack(x, ids, self.slot_of, fmt=fmt, slots=self.slots, tile=tile)
        tiles = ExpertTiles(
            self.memory,
            self._gate_up_table,
            self.wide,
            packed.tile_slot,
            packed.tile_rows,
            packed.num_tiles,
        )
        h = self._gate_up(layout, self.activation, tiles, packed.xp, k)
        if fp8:  # blocks of 128 are whole groups, within which `k_order` permutes
            h = self._fp8(h)
        return self._down(layout, replace(tiles, table=self._down_table), h)

    def combine(
        self, y: Tensor, ids: Tensor, weights: Tensor, cold: Tensor | None, slot_of: Tensor
    ) -> Tensor:
        """The layer's output, bf16 [T, H]: hot pairs by id, weighted, then the CPU's part.

        Args:
            y: from `rows`, of the same ids.
            weights: float32 [T, k].
            cold: float32 [T, H], or None where the CPU computes nothing.
            slot_of: as it was for `rows`.
        """
        if not ids.shape[0]:
            return y.new_empty((0, self.layout.hidden), dtype=torch.bfloat16)
        return self._combine(y, ids, weights, slot_of, cold)
