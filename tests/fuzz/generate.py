"""Random layers and random calls. Everything comes from one `random.Random`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_moe.cpu_kernels.dsl.tiers import available_tiers
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.wrapper import KTMoEWrapper
from tests.cpu_kernels.cases import ACTIVATION_ERROR, decode, random_expert
from tests.reference import Evaluation, evaluate

PROJECTIONS = ("gate", "up", "down")
TIERS = tuple(report.tier.name for report in available_tiers() if not report.missing)
LONGEST = 40
"""Tokens of the largest calls."""


def generator(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(64))


@dataclass(frozen=True)
class Sizes:
    """What the layers of one model have in common.

    Attributes:
        method, isa: the wrapper's arguments.
        threads, pools: of the wrapper.
        limit, alpha: of the activation.
        E, k, H: experts, experts per token, hidden size.
    """

    method: str
    isa: str | None
    threads: int
    pools: int
    limit: float
    alpha: float
    E: int
    k: int
    H: int

    @classmethod
    def random(cls, rng: random.Random, cores: int) -> Sizes:
        E = rng.choice((1, 2, 3, 5, 8, 12))
        threads = rng.choice((1, 1, cores))  # more than one core is not always idle
        return cls(
            method=rng.choice(("MXFP4", "MXFP4", "BF16")),
            isa=rng.choice((None, None, *TIERS)),
            threads=threads,
            pools=rng.randint(1, threads),
            limit=rng.choice((0.0, 0.0, 0.7, 10.0)),
            alpha=rng.choice((0.0, 0.0, 1.702)),
            E=E,
            k=rng.randint(1, min(E, 6)),
            H=32 * rng.randint(1, 7),
        )


class Weights:
    """One layer's experts as tensors for the wrapper, and in float64 by the id of the router.

    Args:
        spare: at most so many more experts than the router has ids.
    """

    def __init__(self, rng: random.Random, sizes: Sizes, spare: int) -> None:
        self.I = 32 * rng.randint(1, 5)
        self.bias = rng.random() < 0.3
        numbers, fmt = generator(rng), DENSE_FORMATS[sizes.method]
        stored = sizes.E + rng.randint(0, spare)
        experts = [random_expert(fmt, numbers, sizes.H, self.I, self.bias) for _ in range(stored)]
        self.mapping = torch.tensor([rng.randrange(stored) for _ in range(sizes.E)])
        if rng.random() < 0.5:
            self.mapping = torch.randperm(
                stored, generator=torch.Generator().manual_seed(rng.getrandbits(32))
            )[: sizes.E]
        self.tensors: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        chosen = self.mapping.tolist()
        for name in PROJECTIONS:
            matrices = [getattr(expert, name) for expert in experts]
            codes = torch.from_numpy(np.stack([m.codes for m in matrices]))
            if matrices[0].scales is None:
                codes = codes.view(torch.int16).view(torch.bfloat16)
                self.tensors[f"{name}_proj"] = codes.float() if rng.random() < 0.3 else codes
            else:
                self.tensors[f"{name}_proj"] = codes
                scales = torch.from_numpy(np.stack([m.scales for m in matrices]))
                self.tensors[f"{name}_scale"] = scales
            self.values[name] = np.stack([decode(fmt, matrices[e]) for e in chosen])
            if self.bias:
                biases = np.stack([m.bias for m in matrices])
                self.tensors[f"{name}_bias"] = torch.from_numpy(biases)
                self.values[f"{name}_bias"] = biases[chosen].astype(np.float64)

    def checkpoint(self, layer: int) -> dict[str, torch.Tensor]:
        """As a checkpoint under DeepSeek-V4's names stores MXFP4 experts without biases."""
        tensors = {}
        for key, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for e, codes in enumerate(self.tensors[f"{name}_proj"]):
                stem = f"layers.{layer}.ffn.experts.{e}.{key}"
                tensors[f"{stem}.weight"] = codes.view(torch.int8).contiguous()
                scale = self.tensors[f"{name}_scale"][e].contiguous()
                tensors[f"{stem}.scale"] = scale.view(torch.float8_e8m0fnu)
        return tensors

    def load(self, wrapper: KTMoEWrapper) -> None:
        wrapper.load_weights_from_tensors(physical_to_logical_map_cpu=self.mapping, **self.tensors)

    def expected(self, sizes: Sizes, call: Call, ids: torch.Tensor, skip: Any) -> Evaluation:
        """The reference's output for `ids` of a call, without the experts in `skip`."""
        return evaluate(
            call.hidden.double().numpy(),
            ids.numpy(),
            call.weights.to(torch.float32).numpy(),
            *(self.values[name] for name in PROJECTIONS),
            **{name: self.values.get(name) for name in ("gate_bias", "up_bias", "down_bias")},
            limit=sizes.limit,
            alpha=sizes.alpha,
            skip=skip,
            activation_error=ACTIVATION_ERROR[sizes.method],
        )


@dataclass
class Call:
    """The arguments of a submission, of any strides and dtypes that are allowed."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, rng: random.Random, sizes: Sizes, tokens: int | None = None) -> Call:
        if tokens is None:
            tokens = rng.choice((0, 1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 9, 17, LONGEST))
        numbers = generator(rng)
        shape = (tokens, sizes.k)
        order = np.argsort(numbers.random((tokens, sizes.E)), axis=1)[:, : sizes.k]
        ids = torch.from_numpy(order.copy())
        if rng.random() < 0.2:  # one expert several times in a token
            ids = torch.from_numpy(numbers.integers(0, sizes.E, shape))
        if tokens and rng.random() < 0.25:
            for _ in range(rng.randint(1, 3)):
                strange = (-1, -1, sizes.E, sizes.E + 3, -(2**31), 2**31 - 1)
                ids[rng.randrange(tokens), rng.randrange(sizes.k)] = rng.choice(strange)
        hidden = torch.from_numpy(numbers.standard_normal((tokens, sizes.H)) * rng.choice((1, 3)))
        weights = torch.from_numpy(numbers.random(shape) + 0.05)
        if rng.random() < 0.6:  # as a runtime passes them
            return cls(hidden.bfloat16(), ids, weights.float())
        return cls(
            strided(rng, hidden.bfloat16()),
            strided(rng, ids.to(rng.choice((torch.int32, torch.int64)))),
            strided(rng, weights.to(rng.choice(FLOATS))),
        )

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights

    @property
    def tokens(self) -> int:
        return len(self.hidden)

    @property
    def distinct(self) -> bool:
        """Whether no token has an expert twice: rounding errors of slots are independent."""
        rows = self.ids.sort(dim=1).values
        return not bool((rows[:, 1:] == rows[:, :-1]).any())

    def clone(self) -> Call:
        """The same values, strides and dtypes in memory of their own."""
        return Call(*(copied(t) for t in self.args))

    def clobber(self) -> None:
        """What a caller may do as soon as `submit_forward` has returned."""
        self.hidden.fill_(float("nan"))
        self.ids.fill_(-1)
        self.weights.fill_(float("inf"))


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def strided(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values, perhaps with other strides or in the middle of a larger tensor."""
    rows, columns = tensor.shape
    way = rng.randrange(4)
    if way == 1:
        return tensor.t().contiguous().t()
    if way == 2:
        wide = tensor.new_zeros(rows, 2 * columns)
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if way == 3:
        tall = tensor.new_zeros(rows + 3, columns + 1)
        tall[2 : rows + 2, 1:] = tensor
        return tall[2 : rows + 2, 1:]
    return tensor


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of the original."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)


def save(folder: Path, layers: dict[int, Weights]) -> Path:
    """A checkpoint of these layers."""
    from safetensors.torch import save_file

    tensors = {k: t for index, w in layers.items() for k, t in w.checkpoint(index).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
