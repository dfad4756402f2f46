"""Which layers of an SGLang process are one model: what `KTMoEWrapper` defers along."""

from __future__ import annotations

from hybrid_moe.runtime.deferral import DeferralChain


class TargetModel:
    """The chain of the model that SGLang is building.

    A process has one target model at a time, and SGLang makes its layers in ascending order; draft
    models have no CPU side. So an index that does not grow begins another model: one that is built
    anew, perhaps while the old one still lives.
    """

    def __init__(self) -> None:
        self._chain = DeferralChain()
        self._newest = -1

    def chain_of(self, layer_idx: int) -> DeferralChain:
        """The chain for the next layer that is made."""
        if layer_idx <= self._newest:
            self._chain = DeferralChain()
        self._newest = layer_idx
        return self._chain


TARGET_MODEL = TargetModel()
"""Of this process."""
