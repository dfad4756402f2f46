"""Publishing an expert that has been packed."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, store_release
from hybrid_moe.cpu_kernels.jit.record import Word


@driver
def publish_word(word: Word, value: int) -> None:
    """Store behind all earlier stores: pairs with the acquire of `route.expert_state`."""
    store_release(word, value)
