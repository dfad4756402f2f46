"""Assisted generation that goes on behind what a cache holds.

Transformers (5.23) cuts what the cache holds from the prompt, but not where something drafts: the
model would read the whole prompt once more, behind itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def behind_cache(model: Any, held: int) -> Iterator[None]:
    """Let the first step of the answers of `model.generate` read the prompt without its first
    `held` tokens."""
    prepare = type(model).prepare_inputs_for_generation

    def without_held(input_ids: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - held
        return prepare(model, input_ids, **kwargs)

    # `generate` reads there which arguments the model knows
    own = inspect.signature(model.prepare_inputs_for_generation)
    without_held.__signature__ = own  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = without_held
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation
