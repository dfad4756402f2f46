"""What an engine must do to be compared: continue token ids, and say when each token came."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from whole_model.clock import TokenClock


class Engine(ABC):
    """A library with a whole model loaded. Raises `UnavailableError` for what it cannot run."""

    @abstractmethod
    def __init__(
        self, folder: Path, weights: list[Path], dense: str, threads: int, context: int
    ) -> None:
        """Load the model.

        Args:
            folder: the checkpoint.
            weights: GGUF files of the same weights; empty for libraries that read the checkpoint.
            dense: format of linear layers.
            context: the most tokens that will be in the cache.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """Name and version."""

    @abstractmethod
    def generate(self, prompt: list[int], new: int, clock: TokenClock) -> list[int]:
        """Continue `prompt` by `new` tokens, the likeliest each, which are returned."""

    @abstractmethod
    def generate_behind(self, context: int, token: int, new: int, clock: TokenClock) -> list[int]:
        """Continue `token` by `new` tokens where `context` others are in the cache already: random
        keys and values, since their speed is that of any other."""
