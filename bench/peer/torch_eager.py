"""PyTorch in eager mode: a loop over the experts of the batch, as Transformers runs them.

MXFP4 weights are kept as they are and dequantized where they are used, the only way to hold them
in their own size; BF16 weights are used as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from problem import SOURCES, Array, Batch, Shape
from weights import Codes, random_experts

from peer.interface import Peer, UnavailableError


def _bf16(bits: Array) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


class _Mxfp4Weight:
    """Nibbles and scales of all experts; `[e]` is a bf16 matrix made anew."""

    def __init__(self, sources: list[Codes], experts: int) -> None:
        self._codes = torch.stack(
            [torch.from_numpy(sources[e % SOURCES].codes.copy()) for e in range(experts)]
        )
        scales = [source.scales for source in sources if source.scales is not None]
        self._scales = torch.stack(
            [torch.from_numpy(scales[e % SOURCES].copy()) for e in range(experts)]
        )
        values = torch.tensor(sources[0].fmt.code.values, dtype=torch.bfloat16)
        byte = torch.arange(256)
        # both values of a byte are looked up at once, as one 32-bit word
        self._pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32)

    def __getitem__(self, e: int) -> torch.Tensor:
        codes = self._codes[e]
        words = self._pairs.flatten().index_select(0, codes.flatten().int())
        values = words.view(torch.bfloat16)
        scales = torch.exp2(self._scales[e].float() - 127).bfloat16()
        scaled = values.view(len(codes), -1, 32) * scales.unsqueeze(-1)
        return scaled.view(len(codes), -1)


class TorchEager(Peer):
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        torch.set_num_threads(threads)
        if method not in ("MXFP4", "BF16"):
            raise UnavailableError(f"torch has no {method}")
        sources = random_experts(shape, method)
        self._w: dict[str, torch.Tensor | _Mxfp4Weight] = {}
        for name, size in shape.matrices.items():
            codes = [source[name] for source in sources]
            if method == "MXFP4":
                self._w[name] = _Mxfp4Weight(codes, shape.experts)
            else:
                stacked = torch.empty((shape.experts, *size), dtype=torch.bfloat16)
                for e in range(shape.experts):
                    stacked[e] = _bf16(codes[e % SOURCES].codes)
                self._w[name] = stacked
        self._method = method

    @property
    def label(self) -> str:
        how = "dequantize and multiply" if self._method == "MXFP4" else "bf16 linear"
        return f"torch {torch.__version__} ({how})"

    def prepare(self, batches: list[Batch]) -> None:
        self._batches = [
            (_bf16(b.x), torch.from_numpy(b.ids), torch.from_numpy(b.weights)) for b in batches
        ]

    @torch.inference_mode()
    def call(self, index: int) -> None:
        x, ids, weights = self._batches[index]
        y = torch.zeros(x.shape, dtype=torch.float32)
        for e in torch.bincount(ids.flatten()).nonzero().flatten().tolist():
            token, slot = torch.where(ids == e)
            rows = x[token]
            h = F.silu(F.linear(rows, self._w["gate"][e])) * F.linear(rows, self._w["up"][e])
            out = F.linear(h, self._w["down"][e]).float() * weights[token, slot, None]
            y.index_add_(0, token, out)
        self._y = y.bfloat16()

    def output(self) -> Array:
        array: Array = self._y.float().numpy()
        return array
