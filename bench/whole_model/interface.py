"""What an engine must do to be compared: continue token ids, and say when each token came."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Generation:
    """One answer, greedily.

    Attributes:
        prefill: seconds from the ids to the first new token.
        tokens: the new tokens.
        seconds: of each token after the first.
    """

    prefill: float
    tokens: list[int]
    seconds: list[float]


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
    def generate(self, prompt: list[int], new: int) -> Generation:
        """Continue `prompt` by `new` tokens."""

    @abstractmethod
    def generate_behind(self, context: int, token: int, new: int) -> Generation:
        """Continue `token` by `new` tokens where `context` others are in the cache already: random
        keys and values, since their speed is that of any other."""
