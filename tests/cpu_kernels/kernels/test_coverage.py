"""Every tier x format x shape x number of tokens of one expert, against the float64 reference.

One batch serves all counts: its first c tokens choose expert 0, so c picks the kernel sizes, and
the path on either side of each tier's limits. The reference of a token does not depend on the
others, so it is computed once for the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Array, Case, from_bf16, has_portable_bits, random_batch
from tests.cpu_kernels.emulation import RUNNABLE
from tests.reference import Evaluation, assert_within

COUNTS = (1, 2, 3, 5, 8, 12, 13, 24, 25, 26, 33, 64)
FEWER = (1, 17)
"""Emulated tile registers are Python's work, so they get what differs for them."""
MOST = max(COUNTS)


@dataclass(frozen=True)
class Shape:
    """A layer's sizes and options."""

    hidden: int
    intermediate: int
    bias: bool = False
    activation: Activation = field(default_factory=Activation)

    def __str__(self) -> str:
        return f"{self.hidden}x{self.intermediate}"


SHAPES = (
    Shape(32, 32),
    Shape(32, 160, bias=True),
    Shape(96, 32, activation=Activation(limit=0.5)),
    Shape(160, 96, bias=True, activation=Activation(limit=7.0, alpha=1.702)),
    Shape(224, 352, bias=True, activation=Activation(alpha=1.702)),
)
"""The last has 7 strips of hidden and 11 blocks of intermediate rows: a pass over several strips
never comes out even (nor does it with the 90 strips of gpt-oss's 2880 rows)."""

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
Shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
TierNames = pytest.mark.parametrize("name", TIERS)


def _emulates_tiles(name: str) -> bool:
    return TIERS[name].tiles and RUNNABLE[name] is not TIERS[name]


@functools.cache
def _counts(fmt_name: str, name: str) -> Sequence[int]:
    """Numbers of tokens: some fixed ones, both sides of the limit between few and many, and for
    each kernel that the tier has here (its tile sizes follow from registers, its limits from
    whether it stands on a matrix unit) the fewest tokens that reach it."""
    kernels = kernel_set(fmt_name, RUNNABLE[name])
    limit = min(kernels.tiled_from, MOST)
    counts = {*(FEWER if _emulates_tiles(name) else COUNTS), max(1, limit - 1), limit}
    for tiling, numbers in (
        (kernels.direct, range(1, limit)),
        (kernels.tiled, range(limit, MOST + 1)),
    ):
        seen: dict[int, int] = {}
        for count in numbers:
            for size in tiling.sizes(count):
                seen.setdefault(tiling.kernels[size], count)
        counts.update(seen.values())
    return sorted(counts)


@functools.lru_cache(maxsize=64)
def _case(fmt_name: str, shape: Shape) -> Case:
    return Case.random(
        DENSE_FORMATS[fmt_name],
        shape.hidden,
        shape.intermediate,
        E=3,
        bias=shape.bias,
        activation=shape.activation,
    )


@functools.lru_cache(maxsize=64)
def _layer(fmt_name: str, shape: Shape, name: str) -> ExpertLayer:
    return _case(fmt_name, shape).layer(RUNNABLE[name])


def _batch(shape: Shape) -> tuple[Array, Array, Array]:
    """Every token chooses expert 0, in either slot; a third of them expert 2 too, a third nothing
    (-1), a third an id past the end."""
    x, ids, weights = random_batch(MOST, shape.hidden, 3, 2)
    others = np.array([2, -1, 3])[np.arange(MOST) % 3]
    ids = np.stack([np.zeros(MOST, np.int64), others], axis=1)
    ids[::2] = ids[::2, ::-1]
    return x, ids, weights


@functools.lru_cache(maxsize=64)
def _reference(fmt_name: str, shape: Shape) -> Evaluation:
    return _case(fmt_name, shape).reference(*_batch(shape))


@functools.lru_cache(maxsize=64)
def _largest(fmt_name: str, shape: Shape, name: str) -> Array:
    """The bits of the largest batch."""
    most = max(_counts(fmt_name, name))
    return _layer(fmt_name, shape, name).forward(*(array[:most] for array in _batch(shape)))


@TierNames
@Shapes
@Formats
def test_tokens_of_one_expert(fmt: WeightFormat, shape: Shape, name: str) -> None:
    """Within the bound; and for any count the bits of the largest, which are those of the
    portable tier, since weights and sums are normal numbers."""
    if _emulates_tiles(name) and shape is SHAPES[-1]:
        pytest.skip("emulated tile registers are too slow for it")
    layer, (x, ids, weights) = _layer(fmt.name, shape, name), _batch(shape)
    expected = _reference(fmt.name, shape)
    bits = _largest(fmt.name, shape, "portable" if has_portable_bits(fmt, name) else name)
    for count in _counts(fmt.name, name):
        job = layer.submit(x[:count], ids[:count], weights[:count])
        assert job.ignored == (ids[:count] % 4 == 3).sum()
        out = job.wait()
        rows = Evaluation(expected.value[:count], expected.bound[:count], expected.sigma[:count])
        assert_within(from_bf16(out), rows)
        assert np.array_equal(out, bits[:count]), count


@TierNames
@Formats
def test_the_counts_take_every_kernel(fmt: WeightFormat, name: str) -> None:
    """Both paths, and every kernel of both, whatever tile sizes the tier has on this machine."""
    kernels, counts = kernel_set(fmt.name, RUNNABLE[name]), _counts(fmt.name, name)
    taken = set()
    for count in counts:
        tiling = kernels.direct if count < kernels.tiled_from else kernels.tiled
        taken |= {tiling.kernels[size] for size in tiling.sizes(count)}
    assert taken == {*kernels.direct.kernels.values(), *kernels.tiled.kernels.values()}


@TierNames
@Formats
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_nothing_to_do_gives_zeros(fmt: WeightFormat, tokens: int, name: str) -> None:
    """All ids out of range, or all experts skipped: zeros, whatever the routing weights are."""
    shape = SHAPES[-1]
    layer = _layer(fmt.name, shape, name)
    x, ids, _ = random_batch(tokens, shape.hidden, 3, 2)
    weights = np.full((tokens, 2), np.nan, np.float32)
    x[0] = 0x7FC0  # a padding row may hold anything
    job = layer.submit(x, np.full_like(ids, -1), weights)
    assert job.ignored == ids.size
    assert (job.wait() == 0).all()
    job = layer.submit(x, ids, weights, np.ones(3, bool))
    assert job.ignored == 0
    assert (job.wait() == 0).all()
