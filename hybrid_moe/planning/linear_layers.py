"""Linear layers beside the experts: which are computed from strips, and their bytes.

Which they are is told from headers: a two-dimensional `weight` of attention, of a shared expert, of
a dense MLP or of the output layer, whose inputs come in groups of 32 and that has 64 rows or more.
Routers, tables that are only looked up, vision and audio stay with torch, and so does what is
smaller.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.table import format_named
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.header import TensorInfo

TORCH = "torch"
"""The choice that leaves every linear layer to torch."""

DEFAULT = "bf16"

EMBEDDINGS = "embeddings"
"""The part that the output layer belongs to."""

_MLPS = frozenset({"shared experts", "dense MLP"})
_PARTS = _MLPS | {"attention", EMBEDDINGS}
_DOWN = re.compile(r"\b(?:down_proj|w2)\b")
_LAYER = re.compile(r".*?\.\d+\.")
_LOOKED_UP = ("embed", "wte", "tid2eid")


@dataclass(frozen=True)
class DenseLayers:
    """Linear layers that are held in strips.

    Attributes:
        fmt: their format; None where torch computes all of them.
        keys: of their weights and biases in the checkpoint.
        arenas: bytes of strips that share an arena: a layer's projections, or an MLP.
        biases: bytes of their biases, float32.
        weights: of all matrices that every token of a prompt meets: without the output layer,
            which only the last one needs.
    """

    fmt: WeightFormat | None = None
    keys: frozenset[str] = frozenset()
    arenas: tuple[int, ...] = ()
    biases: int = 0
    weights: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all of them; a token reads them all."""
        return sum(self.arenas) + self.biases


def dense_format(choice: str) -> WeightFormat | None:
    """The row of the format table that a user's word means; None for "torch".

    Raises:
        ValueError: there is no such format.
    """
    return None if choice == TORCH else format_named(choice)


def is_looked_up(key: str) -> bool:
    """Whether a tensor is a table of which a token reads one row."""
    return any(word in key for word in _LOOKED_UP)


def is_tied(keys: Mapping[str, object]) -> bool:
    """Whether a model's embeddings are also its output layer, which then has no tensor."""
    return not any("lm_head" in key or key.startswith("head.") for key in keys)


def dense_layers(
    tensors: Mapping[str, TensorInfo], part: Mapping[str, str], fmt: WeightFormat | None
) -> DenseLayers:
    """The linear layers among `tensors`.

    Args:
        tensors: of the model, without experts and draft layers.
        part: key -> part of the model, see `loaders.inspect.part_of`.
        fmt: how they are held; None: not in strips.
    """
    if fmt is None:
        return DenseLayers()
    tied = is_tied(tensors)
    taken = [t for key, t in tensors.items() if _is_linear(t, part[key], fmt, tied=tied)]
    biases = [key for t in taken if (key := t.key.removesuffix("weight") + "bias") in tensors]
    arenas: Counter[str] = Counter()
    bias_rows = 0
    for t in taken:
        layer, mlp = _LAYER.match(t.key), part[t.key] in _MLPS
        # a strip of an MLP has 32 rows of gate and the same of up
        paired = mlp and not _DOWN.search(t.key)
        rows = round_up(t.shape[0], GROUP if paired else STRIP_ROWS)
        shared = f"{layer[0] if layer else t.key} {part[t.key]}"
        arenas[shared] += rows * strip_layout(fmt, t.shape[1]).nbytes // STRIP_ROWS
        bias_rows += 0 if mlp else rows
    return DenseLayers(
        fmt=fmt,
        keys=frozenset([*(t.key for t in taken), *biases]),
        arenas=tuple(arenas.values()),
        biases=4 * bias_rows,
        weights=sum(math.prod(t.shape) for t in taken if part[t.key] != EMBEDDINGS),
    )


def _is_linear(tensor: TensorInfo, part: str, fmt: WeightFormat, *, tied: bool) -> bool:
    if part not in _PARTS or not tensor.key.endswith(".weight") or len(tensor.shape) != 2:
        return False
    N, K = tensor.shape
    if N < STRIP_ROWS or K % GROUP or K % fmt.k_multiple:
        return False
    return tied or not is_looked_up(tensor.key)
