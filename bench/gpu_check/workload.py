"""Layers of real models with random experts in slots, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.table import format_named
from hybrid_moe.gpu_kernels.layout_text import layout_from_text
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor

FORMATS = ("MXFP4", "BF16")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
REHEARSED_TOKENS = (1, 40)


SILU = Activation()


@dataclass(frozen=True)
class Model:
    """One MoE layer: H, I, experts E, experts of a token k, and gpt-oss's options."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    biases: bool = False
    activation: Activation = SILU

    def layout(self, fmt: str) -> SlotLayout:
        """Of a slot, as one pool packs it."""
        biases = " biases" if self.biases else ""
        parts = f"0:{self.intermediate // 32}/0:{-(-self.hidden // 64)}"
        return layout_from_text(f"{fmt}/{fmt} {self.hidden}x{self.intermediate}{biases} {parts}")

    def small(self) -> Model:
        """The same in the size of a test, ragged where the model is."""
        hidden = 96 if self.hidden % 128 else 128
        return replace(self, hidden=hidden, intermediate=64, experts=16)


MODELS = (
    Model("gpt-oss-120b", 2880, 2880, 128, 4, True, Activation(7.0, 1.702)),
    Model("V4-Flash", 4096, 2048, 256, 6, activation=Activation(10.0)),
    Model("Qwen3-30B", 2048, 768, 128, 8),
)


def random_slots(layout: SlotLayout, slots: int, device: torch.device) -> Tensor:
    """Valid random experts, uint8 [slots, nbytes]: weights of about unit variance over sqrt(K)."""
    memory = torch.zeros((slots, layout.nbytes), dtype=torch.uint8, device=device)
    (share,) = layout.shares
    for strips, first, count in (
        (share.gate_up, 0, len(share.blocks)),
        (share.down, share.down_offset, len(share.strips)),
    ):
        part = memory[:, first : first + count * strips.nbytes]
        groups = part.unflatten(1, (count * strips.groups, strips.group_bytes))
        if layout.formats.gate_up is format_named("BF16"):
            values = torch.randn((*groups.shape[1:-1], strips.code_bytes // 2), device=device)
            groups[:] = (0.02 * values).bfloat16().view(torch.uint8)
            continue
        groups[..., : strips.code_bytes].random_(0, 256)
        groups[..., strips.code_bytes :].random_(119, 122)  # E8M0: 2^-8 to 2^-6
    return memory


@dataclass(frozen=True)
class Batch:
    """x bf16 [T, H], ids int64 [T, k] of distinct experts each, weights float32 [T, k]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def distinct(self) -> int:
        """Experts that it uses."""
        return int(self.ids.unique().numel())


def random_batches(model: Model, tokens: int, device: torch.device) -> list[Batch]:
    """Batches that use other experts one after another: so many that 200 MB of weights lie between
    two uses of an expert even in the smallest format, where the batch does not use them all."""
    count = 1 if tokens >= 256 else max(2, min(16, 64 // tokens))
    generator = torch.Generator().manual_seed(tokens)
    made = []
    for _ in range(count):
        scores = torch.rand((tokens, model.experts), generator=generator)
        x = torch.randn((tokens, model.hidden), generator=generator).bfloat16()
        weights = torch.rand((tokens, model.top_k), generator=generator)
        ids = scores.topk(model.top_k).indices
        made.append(Batch(x.to(device), ids.to(device), weights.to(device)))
    return made


def models(rehearsal: bool) -> Sequence[Model]:
    """What is measured here."""
    return [model.small() for model in MODELS] if rehearsal else MODELS
