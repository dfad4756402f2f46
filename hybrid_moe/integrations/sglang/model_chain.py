"""Which layers of an SGLang process are one model: what `KTMoEWrapper` defers along."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule import streamed_prefill


class TargetModel:
    """The chain of the model that SGLang is building.

    A process has one target model at a time, and SGLang makes its layers in ascending order; draft
    models have no CPU side. So an index that does not grow begins another model: one that is built
    anew, perhaps while the old one still lives.
    """

    def __init__(self) -> None:
        self._chain = DeferralChain()
        self._prefill_stream: PrefillStream | None = None
        self._newest = -1

    def chain_of(self, layer_idx: int) -> DeferralChain:
        """The chain for the next layer that is made."""
        if layer_idx <= self._newest:
            self._chain, self._prefill_stream = DeferralChain(), None
        self._newest = layer_idx
        return self._chain

    def prefill_stream(self, environ: Mapping[str, str] = os.environ) -> PrefillStream | None:
        """That of the model whose layer `chain_of` has been asked for last; None where no memory is
        given for it.

        Raises:
            ValueError: the environment variable's value.
        """
        memory = streamed_prefill.stream_memory(environ)
        if memory is not None and self._prefill_stream is None:
            self._prefill_stream = streamed_prefill.new_prefill_stream(memory)
        return self._prefill_stream


TARGET_MODEL = TargetModel()
"""Of this process."""
