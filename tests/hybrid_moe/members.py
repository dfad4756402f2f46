"""A layer, as far as a `DeferralChain` sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Layer:
    """A member of a chain without a wrapper behind it; counts how often it was told to `drop`."""

    layer_idx: int
    loaded: bool = True
    hidden_size: int = 64
    drops: int = 0

    def drop(self) -> None:
        self.drops += 1
