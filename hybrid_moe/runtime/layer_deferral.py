"""What one layer defers: which ids run one MoE layer later, and the job that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from hybrid_moe.cpu_kernels.routing_split import RoutingSplit
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred, split_off
from hybrid_moe.runtime.submission import Started

Parts = tuple[torch.Tensor, torch.Tensor | None]
"""Ids that run now and ids that run later, each [T, k]; None: all run now."""


class LayerDeferral:
    """A layer's place in a `DeferralChain`.

    Args:
        shape: of the layer.
        chain: the model's layers; None where none of them defers.
        count: experts per token that may arrive one layer later; with a chain only.

    Attributes:
        count: as given, whether or not a layer follows.
    """

    def __init__(self, shape: LayerShape, chain: DeferralChain | None, count: int) -> None:
        self.count = count
        self._shape, self._chain = shape, chain
        self._protected = shape.num_experts_per_tok - count
        self._logged_last = False

    @property
    def most(self) -> int:
        """Experts of a token that may be deferred: none where no layer follows."""
        return 0 if self._following is None else self.count

    @property
    def _following(self) -> int | None:
        """The layer that deferred experts go to; None if this one defers nothing."""
        if not self.count or self._chain is None:
            return None
        following = self._chain.after(self._shape.layer_idx)
        if following is None and not self._logged_last:
            self._logged_last = True
            self._chain.log_last(self._shape.layer_idx)
        return following

    def split(self, ids: torch.Tensor, weights: torch.Tensor) -> Parts:
        """By the weights, see `split_deferred`; usable on a GPU and under capture."""
        if self._following is None:
            return ids, None
        return split_deferred(ids, weights, self._protected, self._shape.num_experts)

    def split_plain(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[Parts, int]:
        """The same of plain CPU tensors; and, where something is deferred, how many ids are out of
        range: neither part has them."""
        if self._following is None:
            return (ids, None), 0
        now, later = torch.empty_like(ids), torch.empty_like(ids)
        addresses = (tensor.data_ptr() for tensor in (ids, weights, now, later))
        ignored = self._routing_split(ids.size(0), *addresses)
        return (now, later), ignored

    def split_off(self, ids: torch.Tensor, later: Sequence[int]) -> Parts:
        """Where it is decided which experts run later."""
        return split_off(ids, later) if later else (ids, None)

    def out_of_range(self, ids: torch.Tensor) -> int:
        """How many ids are."""
        return int(((ids < 0) | (ids >= self._shape.num_experts)).sum())

    @cached_property
    def _routing_split(self) -> RoutingSplit:
        shape = self._shape
        return RoutingSplit(shape.num_experts, shape.num_experts_per_tok, self._protected)

    def take(self, tokens: int) -> Started | None:
        """See `DeferralChain.take`."""
        return None if self._chain is None else self._chain.take(self._shape.layer_idx, tokens)

    def carry(self, job: Started) -> None:
        """Leave what is deferred to the following layer."""
        following = self._following
        assert following is not None and self._chain is not None
        self._chain.carry(self._shape.layer_idx, following, job)

    def drop(self) -> None:
        """Drop what this layer has deferred, if that is under way."""
        if self._chain is not None:
            self._chain.drop(self._shape.layer_idx)

    def reset(self) -> None:
        """Drop whatever is under way in the model."""
        if self._chain is not None:
            self._chain.reset()
