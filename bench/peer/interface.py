"""What a library must do to be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod

from problem import Array, Batch, Shape


class UnavailableError(Exception):
    """This library cannot run this problem; the message says why."""


class Peer(ABC):
    """A library with one MoE layer loaded. Plain SwiGLU, no biases: what every peer can do."""

    @abstractmethod
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        """Load random experts (`weights.random_experts`, cyclically).

        Raises:
            UnavailableError: the library cannot run this method or shape.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """Name, version and the kernel that was chosen."""

    @abstractmethod
    def prepare(self, batches: list[Batch]) -> None:
        """Convert the inputs of later calls to the library's own types."""

    @abstractmethod
    def call(self, index: int) -> None:
        """One forward pass with batch `index`; returns when the output is complete."""

    def experts(self) -> list[dict[str, Array]] | None:
        """float64 matrices of the experts as the library holds them; None where they are those that
        were given, to the bit: it then has quantized nothing itself."""
        return None

    @abstractmethod
    def output(self) -> Array:
        """float32 [T, H] of the last call."""
