"""Which rank has which experts, where each GPU of several holds whole ones."""

from __future__ import annotations

from collections.abc import Sequence


def experts_of_rank(
    experts: Sequence[int], layer_idx: int, rank: int, ranks: int
) -> tuple[int, ...]:
    """The share of `rank`: every `ranks`-th of a layer's experts on GPUs.

    The rank that begins changes from layer to layer. Else the first ranks would have one expert
    more in every layer, and what a GPU has room for beside the experts is decided by the fullest.
    """
    return tuple(experts[(rank - layer_idx) % ranks :: ranks])
