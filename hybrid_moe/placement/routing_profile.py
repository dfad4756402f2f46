"""`RoutingProfile`: how often a model's routers chose each expert, measured on real tokens.

It is what placement is decided from. `hybrid-moe profile` writes it, SGLang's recorder gives one
too (`sglang_dump`); the file's form is `routing_profile_file`'s.

    counts         pairs of (token, expert), by phase: prefill and decode route alike on average,
                   but a placement serves one of them more than the other
    pairs          which experts one token uses together: what wants to be on one GPU
    windows        the same counts in the order of time: what drifts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

PHASES = ("prefill", "decode", "unknown")
"""Rows of `by_phase`. Recorders that do not tell the first two apart fill the third."""

MAX_WINDOWS = 16
"""More are merged, two into one: a profile of a day has the resolution of a profile of an hour."""


def shares_of(counts: Counts) -> npt.NDArray[np.float64]:
    """float64 [..., E]: counts [..., E] over the sum of their row; 1 / E where that is 0."""
    of = counts.sum(-1, keepdims=True)
    share: npt.NDArray[np.float64] = counts / np.maximum(of, 1)
    return np.where(of > 0, share, 1 / counts.shape[-1])


@dataclass(frozen=True)
class RoutedModel:
    """What a profile says about the model that it was measured on.

    Formats of weights are not part of it: a quantised model routes nearly as its origin does.

    Attributes:
        model_type: as in `config.json`, for people: engines give one family several names.
        hidden_size: H; 0 where the source does not say.
        num_experts: routed experts E of each layer.
        top_k: experts of a token, k.
        layers: indices of the L layers with experts, ascending, dense layers counted.
    """

    model_type: str
    hidden_size: int
    num_experts: int
    top_k: int
    layers: tuple[int, ...]

    def differences(self, other: RoutedModel) -> list[str]:
        """What differs in `other`, in words; what either does not know is not compared."""
        found = []
        for name in ("hidden_size", "num_experts", "top_k", "layers"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine and its and mine != its:
                found.append(f"{name} is {_shown(mine)}, not {_shown(its)}")
        return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} layers from {value[0]} to {value[-1]}"
    return repr(value)


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Measured routing of one model. Arrays are int64; rows l are `model.layers` in order.

    Attributes:
        model: what was measured.
        by_phase: [3, L, E]: pairs of a token and expert e of layer l, by `PHASES`.
        tokens: [3]: tokens of each phase.
        pairs: [L, E, E]: tokens that chose both e and f (symmetric, the diagonal is 0); None where
            the source does not tell. A file keeps the most frequent pairs of each layer only.
        pairs_kept: [L] float64: share of all pairs of experts that `pairs` has (1 for all).
        windows: [W, L, E]: counts of all phases in consecutive spans of time, W up to
            `MAX_WINDOWS`; they sum to the counts. W is 0 where the source does not tell.
        window_tokens: [W].
        source: what the tokens were, for people.

    Raises:
        ValueError: shapes that do not fit each other, or a negative count.
    """

    model: RoutedModel
    by_phase: Counts
    tokens: Counts
    pairs: Counts | None = None
    pairs_kept: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    windows: Counts = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    window_tokens: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    source: str = ""

    def __post_init__(self) -> None:
        L, E = self.shape
        if self.pairs is not None and not len(self.pairs_kept):
            object.__setattr__(self, "pairs_kept", np.ones(L))
        W = len(self.window_tokens)
        if not W and not self.windows.size:
            object.__setattr__(self, "windows", np.zeros((0, L, E), np.int64))
        shapes = {
            "by_phase": (self.by_phase, (len(PHASES), L, E)),
            "tokens": (self.tokens, (len(PHASES),)),
            "pairs_kept": (self.pairs_kept, (0 if self.pairs is None else L,)),
            "windows": (self.windows, (W, L, E)),
        }
        if self.pairs is not None:
            shapes["pairs"] = (self.pairs, (L, E, E))
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise ValueError(f"{name} has shape {list(array.shape)}, must be {list(shape)}")
            if array.size and array.min() < 0:
                raise ValueError(f"{name} has {array.min()}, must not be negative")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self.model.layers), self.model.num_experts

    @property
    def counts(self) -> Counts:
        """[L, E], all phases together."""
        total: Counts = self.by_phase.sum(0)
        return total

    @property
    def prefill(self) -> Counts:
        """[L, E]."""
        prefill: Counts = self.by_phase[0]
        return prefill

    @property
    def decode(self) -> Counts:
        """[L, E]."""
        decode: Counts = self.by_phase[1]
        return decode

    def shares(self, phase: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [L, E]: each expert's share of its layer's pairs; 1 / E in a layer without any.

        Args:
            phase: one of `PHASES`; None for all together.
        """
        counts = self.counts if phase is None else self.by_phase[PHASES.index(phase)]
        return shares_of(counts)

    def use(self, phase: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [L, E]: the share of tokens that use an expert, k times its share of pairs."""
        return self.shares(phase) * self.model.top_k

    def check(self, model: RoutedModel, where: str) -> None:
        """Raise `ValueError` unless it was measured on such a model.

        Args:
            where: what messages call the profile: its path.
        """
        found = self.model.differences(model)
        if found:
            raise ValueError(
                f"{where} was measured on another model: its {'; its '.join(found)}. Measure this "
                "one with: hybrid-moe profile --model DIR --data FILE --out profile.json"
            )


def merged_windows(
    windows: Counts, tokens: Counts, limit: int = MAX_WINDOWS
) -> tuple[Counts, Counts]:
    """At most `limit` windows: neighbours are added, two into one, as often as needed."""
    while len(tokens) > limit:
        windows = np.add.reduceat(windows, np.arange(0, len(tokens), 2), axis=0)
        tokens = np.add.reduceat(tokens, np.arange(0, len(tokens), 2))
    return windows, tokens


def together(profiles: Sequence[RoutingProfile]) -> RoutingProfile:
    """One profile of what several measured, one after the other.

    Raises:
        ValueError: none, or profiles of different models.
    """
    if not profiles:
        raise ValueError("no profile is given, one at least is needed")
    first = profiles[0]
    for profile in profiles[1:]:
        first.check(profile.model, f"the profile of {first.source or 'the first text'}")
    pairs, kept = None, np.zeros(0)
    if all(p.pairs is not None for p in profiles):
        found = [p.pairs for p in profiles if p.pairs is not None]
        pairs = np.sum(found, axis=0)
        shares = [np.maximum(p.pairs_kept, 1e-9) for p in profiles]
        every = np.sum([p.sum((1, 2)) / s for p, s in zip(found, shares, strict=True)], axis=0)
        kept = np.where(every > 0, pairs.sum((1, 2)) / np.maximum(every, 1e-9), 1.0)
    told = all(len(p.window_tokens) for p in profiles)
    windows, tokens = first.windows[:0], first.window_tokens[:0]
    if told:
        windows, tokens = merged_windows(
            np.concatenate([p.windows for p in profiles]),
            np.concatenate([p.window_tokens for p in profiles]),
        )
    return RoutingProfile(
        first.model,
        np.sum([p.by_phase for p in profiles], axis=0),
        np.sum([p.tokens for p in profiles], axis=0),
        pairs,
        kept,
        windows,
        tokens,
        "; ".join(p.source for p in profiles if p.source),
    )
