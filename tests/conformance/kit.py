"""What the clauses are made of: a checkpoint, batches, and the float64 answer.

Nothing here imports an implementation. The checkpoint has random MXFP4 experts under the names
that DeepSeek-V4 publishes, the one naming that every implementation of `method="MXFP4"` reads.

    y[t] = sum over the slots s of token t of  weights[t, s] * W_down[e] h,   e = ids[t, s]
    h = silu(min(g, L)) * clip(u, -L, L)                              with clamp L, alpha = 0
    h = min(g, L) * sigmoid(alpha min(g, L)) * (clip(u, -L, L) + 1)   alpha > 0
    g = W_gate[e] x[t],   u = W_up[e] x[t]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

E, K, H, I = 8, 3, 256, 128
LAYERS = 5
CHUNK = 64
"""`chunked_prefill_size` of the wrappers."""

ERROR_BOUND = 2.0**-6
"""Largest |y - reference| / |reference| of a row, in the Euclidean norm. An implementation may
round gate, up, h and y to bf16 (2^-8 each at the worst, here added as if aligned); 8-bit
activations stay below it too. A wrong nibble, scale, clamp or expert is beyond 2^-3."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Weights:
    """MXFP4 experts of one layer: codes uint8 [E, N, K/2], scales uint8 [E, N, K/32]."""

    codes: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]

    @classmethod
    def random(cls, seed: int, hidden: int = H, intermediate: int = I) -> Weights:
        rng = np.random.default_rng(seed)
        codes, scales = {}, {}
        for name in ("gate", "up", "down"):
            N, inputs = (hidden, intermediate) if name == "down" else (intermediate, hidden)
            codes[name] = rng.integers(0, 256, (E, N, inputs // 2), dtype=np.uint8)
            spread = rng.integers(-2, 2, (E, N, inputs // 32))
            scales[name] = (127 + spread - round(np.log2(inputs) / 2)).astype(np.uint8)
        return cls(codes, scales)

    def values(self, name: str) -> np.ndarray:
        """Dequantized, float64 [E, N, K]."""
        codes = self.codes[name]
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        exponents = np.repeat(self.scales[name].astype(int) - 127, 32, axis=-1)
        return np.ldexp(E2M1[nibbles], exponents)

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """As a checkpoint stores them."""
        stored = {}
        for key, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for e in range(E):
                stem = f"layers.{layer}.ffn.experts.{e}.{key}"
                stored[f"{stem}.weight"] = torch.from_numpy(self.codes[name][e]).view(torch.int8)
                scale = torch.from_numpy(self.scales[name][e])
                stored[f"{stem}.scale"] = scale.view(torch.float8_e8m0fnu)
        return stored

    def forward(
        self,
        batch: Batch,
        *,
        skip: set[int] | None = None,
        mapping: torch.Tensor | None = None,
        limit: float = 0.0,
        alpha: float = 0.0,
    ) -> np.ndarray:
        """The float64 answer [T, H]. Ids outside 0..E-1 and those in `skip` contribute zero; id i
        is expert `mapping[i]`."""
        x = batch.hidden.double().cpu().numpy()
        ids, weights = batch.ids.cpu().numpy(), batch.weights.double().cpu().numpy()
        gate, up, down = (self.values(name) for name in ("gate", "up", "down"))
        y = np.zeros((len(x), down.shape[1]))
        for t, s in np.ndindex(ids.shape):
            i = int(ids[t, s])
            if not 0 <= i < E or i in (skip or set()):
                continue
            e = i if mapping is None else int(mapping[i])
            g, u = gate[e] @ x[t], up[e] @ x[t]
            if limit:
                g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
            with np.errstate(over="ignore"):  # exp of a large number: the sigmoid is 0
                h = g / (1 + np.exp(-(alpha or 1.0) * g)) * (u + 1 if alpha else u)
            y[t] += weights[t, s] * (down[e] @ h)
        return y


@dataclass
class Batch:
    """hidden bf16 [T, H], ids int64 [T, K] (distinct in a token), weights fp32 [T, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, tokens: int, seed: int = 0, hidden: int = H) -> Batch:
        rng = torch.Generator().manual_seed(1000 * seed + tokens)
        order = torch.rand(tokens, E, generator=rng).argsort(dim=1)
        return cls(
            torch.randn(tokens, hidden, generator=rng).to(torch.bfloat16),
            order[:, :K].contiguous(),
            torch.rand(tokens, K, generator=rng) + 0.1,
        )

    def on(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, copy=True) for t in self.args))

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights


@dataclass
class Kit:
    """An implementation and how to call it.

    Attributes:
        implementation: the class (or factory) under test.
        module: that it was imported from.
        device: where batches are.
        folder: checkpoint of `LAYERS` layers.
        weights: of each layer.
    """

    implementation: Any
    module: Any
    device: torch.device
    folder: Path
    weights: list[Weights]
    made: list[Any] = field(default_factory=list)

    @property
    def stream(self) -> int:
        """Handle of the stream on which batches are made; 0 on the CPU."""
        if self.device.type == "cpu":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def arguments(self, **changed: Any) -> dict[str, Any]:
        """The constructor's, as keywords; a value of `...` leaves an argument out."""
        given = {
            "layer_idx": 0,
            "num_experts": E,
            "num_experts_per_tok": K,
            "hidden_size": H,
            "moe_intermediate_size": I,
            "gpu_experts_mask": None,
            "cpuinfer_threads": 1,
            "threadpool_count": 1,
            "weight_path": str(self.folder),
            "chunked_prefill_size": CHUNK,
            "method": "MXFP4",
        }
        return {name: value for name, value in (given | changed).items() if value is not ...}

    def make(self, **changed: Any) -> Any:
        """A wrapper without weights."""
        wrapper = self.implementation(**self.arguments(**changed))
        self.made.append(wrapper)
        return wrapper

    def load(self, mapping: torch.Tensor | None = None, **changed: Any) -> Any:
        """A wrapper with the checkpoint's weights."""
        wrapper = self.make(**changed)
        wrapper.load_weights(torch.arange(E) if mapping is None else mapping)
        return wrapper

    def batch(self, tokens: int, seed: int = 0, hidden: int = H) -> Batch:
        return Batch.random(tokens, seed, hidden).on(self.device)

    def forward(self, wrapper: Any, batch: Batch) -> np.ndarray:
        """submit and sync, float64 [T, H]."""
        wrapper.submit_forward(*batch.args, self.stream)
        return self.sync(wrapper, batch.hidden)

    def sync(self, wrapper: Any, hidden: torch.Tensor) -> np.ndarray:
        """The result of a submission, at once copied: it may live in a buffer that is reused."""
        output = wrapper.sync_forward(hidden, self.stream)
        assert output.dtype == torch.bfloat16 and output.device == hidden.device
        assert tuple(output.shape) == tuple(hidden.shape)
        return output.double().cpu().numpy()

    def close(self) -> None:
        """Free what implementations with a `close` can free."""
        for wrapper in self.made:
            if hasattr(wrapper, "close"):
                wrapper.close()


def mask_of(*experts: int) -> torch.Tensor:
    """bool [E], True for `experts`."""
    mask = torch.zeros(E, dtype=torch.bool)
    mask[list(experts)] = True
    return mask


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Every row within `ERROR_BOUND`; rows that are zero are exactly so."""
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected, axis=1)
    size = np.linalg.norm(expected, axis=1)
    wrong = np.flatnonzero(~(error <= ERROR_BOUND * size))
    assert not wrong.size, (
        f"row {wrong[0]} of {len(actual)}: error {error[wrong[0]]:.3g}, "
        f"reference {size[wrong[0]]:.3g}, allowed {ERROR_BOUND:.3g} of it"
    )


def write_checkpoint(folder: Path, weights: list[Weights]) -> Path:
    tensors = {k: t for layer, w in enumerate(weights) for k, t in w.tensors(layer).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
