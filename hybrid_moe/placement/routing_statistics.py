"""What a routing profile says: balance, hit rates, drift, and which experts go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.placement.routing_profile import Counts, RoutingProfile, shares_of

Floats = npt.NDArray[np.float64]

LEAST_EXPECTED = 5.0
"""Tokens that a pair must be expected to share before its affinity is looked at: below, chance
decides (the usual rule of chi-squared tests)."""


def entropy_bits(counts: Counts) -> Floats:
    """float64 [L]: entropy of the experts' shares of counts [L, E]; log2(E) is perfect balance."""
    share = shares_of(counts)
    bits: Floats = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)
    return bits


def hit_rate_curve(placed_by: Counts, measured: Counts) -> Floats:
    """float64 [L * E + 1]: share of the pairs of `measured` that are hot when the n most used
    experts of `placed_by` are, for n from 0 on.

    Args:
        placed_by, measured: [L, E]. A layer counts as any other: each has k pairs of a token.

    Of equally used experts those of lower layers and ids come first.
    """
    order = np.argsort(-shares_of(placed_by).ravel(), kind="stable")
    caught = np.cumsum(shares_of(measured).ravel()[order]) / len(measured)
    curve: Floats = np.concatenate([[0.0], caught])
    return curve


def halves(profile: RoutingProfile) -> tuple[Counts, Counts] | None:
    """Counts [L, E] of the first and of the second half of the time; None without windows.

    A placement that is chosen by all counts and measured on them knows the future. Chosen by the
    first half and measured on the second it does not.
    """
    tokens = np.cumsum(profile.window_tokens)
    if len(tokens) < 2:
        return None
    cut = int(np.clip(np.searchsorted(tokens, tokens[-1] / 2) + 1, 1, len(tokens) - 1))
    return profile.windows[:cut].sum(0), profile.windows[cut:].sum(0)


@dataclass(frozen=True)
class Drift:
    """How the use of experts changes from each window to the next.

    Attributes:
        distance: float64 [W - 1], total variation of the experts' shares (0: the same, 1: not one
            expert in common), mean over layers.
        by_chance: float64 [W - 1], what it would be without any drift, from the number of tokens.
    """

    distance: Floats
    by_chance: Floats

    def summary(self) -> str:
        """One line."""
        if not len(self.distance):
            return "unknown: the profile has less than two windows of time"
        moved, chance = self.distance.mean(), self.by_chance.mean()
        return (
            f"{100 * moved:.1f} % of the choices move from one window to the next, "
            f"{100 * chance:.1f} % would by chance alone"
        )


def drift(profile: RoutingProfile) -> Drift:
    """The drift over the windows of a profile.

    Of two samples of n and m pairs from one distribution p, the shares of an expert differ by a
    normal deviate of variance p (1 - p) (1/n + 1/m), whose mean absolute value is sqrt(2 / pi)
    times its deviation; total variation is half their sum.
    """
    share = shares_of(profile.windows)
    of = profile.windows.sum(-1)
    distance = np.abs(share[1:] - share[:-1]).sum(-1).mean(-1) / 2
    p = shares_of(profile.windows[1:] + profile.windows[:-1])
    per = 1 / np.maximum(of[1:], 1) + 1 / np.maximum(of[:-1], 1)
    deviation = np.sqrt(p * (1 - p) * per[..., None])
    return Drift(distance, math.sqrt(2 / math.pi) * deviation.sum(-1).mean(-1) / 2)


@dataclass(frozen=True)
class ExpertPair:
    """Two experts of a layer that tokens use together.

    Attributes:
        layer: index in the model. first, second: ids.
        tokens: that used both.
        lift: how many times as often as if they were chosen independently.
    """

    layer: int
    first: int
    second: int
    tokens: int
    lift: float


def strongest_pairs(profile: RoutingProfile, most: int) -> list[ExpertPair]:
    """The pairs that are most surely no coincidence, over all layers; empty where none is known.

    By (observed - expected) / sqrt(expected), where the expected number of tokens is the product of
    both experts' use: those used by less than `LEAST_EXPECTED` together are left out.
    """
    if profile.pairs is None:
        return []
    counts = profile.counts.astype(np.float64)
    tokens = counts.sum(1, keepdims=True)[..., None] / profile.model.top_k  # of each layer
    expected = counts[:, :, None] * counts[:, None, :] / np.maximum(tokens, 1)
    sure = np.triu(np.ones(expected.shape[1:], bool), 1) & (expected >= LEAST_EXPECTED)
    score = np.where(sure, (profile.pairs - expected) / np.sqrt(np.maximum(expected, 1)), -np.inf)
    best = np.argsort(-score.ravel(), kind="stable")[:most]
    found = []
    for at in best:
        row, first, second = (int(i) for i in np.unravel_index(at, score.shape))
        if not score[row, first, second] > 0:
            break
        together = int(profile.pairs[row, first, second])
        lift = together / float(expected[row, first, second])
        found.append(ExpertPair(profile.model.layers[row], first, second, together, lift))
    return found
