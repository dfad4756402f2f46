"""What a batch asks of one layer, once the routing is known: the input of a decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.schedule.layer_work import ExpertCount

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerDemand:
    """The experts of one layer that a batch meets. Arrays have one entry for each cold expert.

    Attributes:
        hot: experts met that are resident on the GPU, and their pairs.
        experts: int64 [m], ids of the cold experts that some token takes, ascending.
        tokens: int64 [m], how many tokens take each.
        weight: float64 [m], sum of their routing weights.
        deferrable: bool [m], no token has it among those of its experts that must run now.
    """

    hot: ExpertCount
    experts: Ints
    tokens: Ints
    weight: npt.NDArray[np.float64]
    deferrable: npt.NDArray[np.bool_]


def demand_of(
    ids: npt.ArrayLike, weights: npt.ArrayLike, hot: npt.ArrayLike, max_deferred: int = 0
) -> LayerDemand:
    """The demand of a batch.

    As in `runtime.deferral`, a token's `max_deferred` experts of least weight may run later, unless
    another token needs them now: then their weights are read anyway.

    Args:
        ids: integer [B, k], experts of each token; those out of range are ignored.
        weights: float [B, k], their routing weights.
        hot: bool [E], experts on the GPU.
        max_deferred: experts of a token that may be deferred.

    Raises:
        ValueError: shapes that do not fit each other, or a negative `max_deferred`.
    """
    chosen, score = np.asarray(ids, np.int64), np.asarray(weights, np.float64)
    resident = np.asarray(hot, bool)
    if chosen.ndim != 2 or chosen.shape != score.shape or resident.ndim != 1:
        raise ValueError(
            f"ids have shape {list(chosen.shape)}, weights {list(score.shape)} and hot "
            f"{list(resident.shape)}: must be [tokens, k] twice and [experts]"
        )
    if max_deferred < 0:
        raise ValueError(f"max_deferred is {max_deferred}, must be 0 or more")
    (E,), k = resident.shape, chosen.shape[1]
    valid = (chosen >= 0) & (chosen < E)
    tokens = np.bincount(chosen[valid], minlength=E)
    weight = np.bincount(chosen[valid], score[valid], minlength=E).astype(np.float64)
    needed = np.ones(E, bool)
    if max_deferred:
        order = np.argsort(np.where(valid, -score, np.inf), axis=1, kind="stable")
        first = np.take_along_axis(chosen, order[:, : max(0, k - max_deferred)], axis=1)
        needed = np.zeros(E, bool)
        needed[first[(first >= 0) & (first < E)]] = True
    met = tokens > 0
    cold = np.flatnonzero(met & ~resident)
    warm = met & resident
    return LayerDemand(
        hot=ExpertCount(float(warm.sum()), float(tokens[warm].sum())),
        experts=cold,
        tokens=tokens[cold],
        weight=weight[cold],
        deferrable=~needed[cold],
    )
