"""What the tests of attention vary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Sizes of a call: B sequences, H key heads of G query heads, Q query tokens, T keys."""

    B: int
    H: int
    G: int
    Q: int
    T: int
    key_dim: int
    value_dim: int
    window: int = 0
    padded: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        return f"{self.B}x{self.H}x{self.G}-q{self.Q}-t{self.T}-d{self.key_dim}-{self.value_dim}"
