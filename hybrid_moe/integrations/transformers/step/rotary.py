"""Rotary positions of one token in one compiled call, with the bits of the model's function.

Transformers' `apply_rotary_pos_emb` is some 15 operations. Files differ in it, so each function is
held against the kernel once for each size, on random values, and runs itself wherever they differ:
interleaved pairs, heads of which a part is rotated, tables in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from hybrid_moe.cpu_kernels.kernels.rotate import LANES
from hybrid_moe.cpu_kernels.row_functions import ROTATE, row_functions
from hybrid_moe.integrations.transformers.step.own_globals import looks_up, set_globals
from hybrid_moe.integrations.transformers.step.plain import is_plain, only_computes

_log = logging.getLogger(__name__)

NAME = "apply_rotary_pos_emb"

_Apply = Callable[..., Any]


def replace_rotary(model: torch.nn.Module) -> int:
    """Let attention modules of `model` rotate compiled; returns how many."""
    replaced = 0
    for module in model.modules():
        function = looks_up(module, NAME)
        if callable(function):
            set_globals(module, {NAME: rotary(function)})
            replaced += 1
    return replaced


@functools.cache
def rotary(own: _Apply) -> _Apply:
    """What `own` gives, which takes (q, k, cos, sin) or something else."""
    proved: dict[tuple[int, int], bool] = {}

    @functools.wraps(own)
    def apply(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 4 or not _applies(*args):
            return own(*args, **kwargs)
        q, k, cos, sin = args
        sizes = q.shape[-1], cos.shape[-1]
        if sizes not in proved:
            proved[sizes] = _agrees(own, *sizes)
            if not proved[sizes]:
                where = f"{own.__module__}.{NAME}"
                _log.info("%s with sizes %s stays torch's: it has other bits", where, sizes)
        if not proved[sizes]:
            return own(q, k, cos, sin)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    return apply


def _applies(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Queries and keys [1, heads, 1, head size] of one token, tables [1, 1, size or half of it]."""
    if not (is_plain(q) and is_plain(k) and is_plain(cos) and is_plain(sin)):
        return False
    size = q.shape[-1]
    return (
        q.ndim == 4
        and q.shape[0] == q.shape[2] == 1
        and k.shape == (1, k.shape[1], 1, size)
        and size % (2 * LANES) == 0
        and cos.shape == sin.shape
        and cos.shape in ((1, 1, size), (1, 1, size // 2))
        and only_computes(q)
    )


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    size = x.shape[-1]
    row_functions()[ROTATE](
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        x.shape[1],
        size // 2,
        size // 2 if cos.shape[-1] == size else 0,
    )
    return out


def _agrees(own: _Apply, size: int, width: int) -> bool:
    """Whether the kernel has the bits of `own`. The halves of its tables are alike, as a model's
    are; a function that exchanged them would be another all the same."""
    rng = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32)
        return values.to(torch.bfloat16)

    q, k = random(1, 8, 1, size), random(1, 2, 1, size)
    halves = [random(1, 1, size // 2) for _ in range(2)]
    cos, sin = (torch.cat([half] * (2 * width // size), -1) for half in halves)
    expected = own(q, k, cos, sin)
    computed = _rotated(q, cos, sin), _rotated(k, cos, sin)
    return all(torch.equal(a, b) for a, b in zip(expected, computed, strict=True))
