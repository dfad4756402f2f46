"""Draft layers (multi-token prediction): layers of a checkpoint that the model does not run.

They lie under names of their own (`mtp.`), or behind the last layer as if they were more of them
(DeepSeek-V3, GLM-4.5). Something must announce the latter: `config.json` by their number, or the
tensors that only a draft layer has. Extra layers that nothing announces are a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from hybrid_moe.loaders.model_config import NUM_DRAFT_LAYERS, ModelConfig
from hybrid_moe.loaders.naming import PREFIX, layer_of

DRAFT = "draft layers"

_OWN_NAMES = r"(^|\.)mtp(_\w+)?\."
"""Matches keys of draft layers that are not among the model's layers."""

_MARKS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
"""Matches keys of a draft layer behind the last one: what joins the token to the hidden state."""


class DraftLayers:
    """The draft layers among `keys`. `in` takes a layer's number, as in `layers.N.`.

    Args:
        config: says how many layers and draft layers there are.
        keys: every key of the checkpoint.
    """

    def __init__(self, config: ModelConfig, keys: Iterable[str]) -> None:
        self._config, self._keys = config, keys

    def __contains__(self, layer: int) -> bool:
        return layer in self.numbers

    def owns(self, key: str) -> bool:
        """Whether a tensor belongs to a draft layer."""
        return any(re.search(pattern, key) for pattern in self.patterns)

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions for the keys of draft layers, to be searched in a key."""
        behind = "|".join(map(str, sorted(self.numbers)))
        return (_OWN_NAMES, *([rf"^{PREFIX}layers\.({behind})\."] if behind else []))

    @cached_property
    def numbers(self) -> frozenset[int]:
        """Numbers of the draft layers that lie behind the model's own."""
        announced = self._announced
        marked = {layer_of(key) for key in self._keys if _MARKS.search(key)}
        if not announced and not marked:
            return frozenset()
        first = self._config.num_layers
        if first is None:  # the marks alone say it
            return frozenset(number for number in marked if number is not None)
        present = {number for key in self._keys if (number := layer_of(key)) is not None}
        return frozenset(
            n for n in present if n >= first and (n in marked or n < first + announced)
        )

    @property
    def _announced(self) -> int:
        """Draft layers that the file states; a number that is a family's default says nothing."""
        for part in (self._config.stated, self._config.raw):
            for name in NUM_DRAFT_LAYERS:
                if type(count := part.get(name)) is int:
                    return max(0, count)
        return 0
