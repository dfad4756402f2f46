"""`RoutingRecorder`: counts what routers choose while a model runs, and makes a profile of it.

    the engine, for each layer of a step:   recorder.add(layer, ids)
    the engine, between steps:              recorder.set_phase("decode"), recorder.mark()

Counting is a few operations of torch on the device of the ids, of fixed shapes: nothing waits for
them, and a CUDA graph that captures them counts at each replay. The phase is a word on the device
too, written in the order of the stream, so one captured graph serves both phases.

Co-activation of many tokens is a product of matrices: U [tokens, E] is 1 where a token chose an
expert, and U^T U [e, f] is the number of tokens that chose both. Its float32 sums are exact up to
2^24 tokens in one call. Of few tokens each of their k x k pairs is added by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hybrid_moe.placement.routing_profile import (
    MAX_WINDOWS,
    PHASES,
    Counts,
    RoutedModel,
    RoutingProfile,
    merged_windows,
)

WINDOW_TOKENS = 256
"""Tokens of a window at first. They double whenever windows are merged."""


class LayerCounts:
    """Of one layer, on the device of its ids.

    Args:
        num_experts: E. device: of the ids. pairs: whether to count pairs of experts.
    """

    def __init__(self, num_experts: int, device: torch.device, *, pairs: bool) -> None:
        E = self._E = num_experts
        with torch.inference_mode(False):  # else only inference mode could add to them
            self._counts = torch.zeros(len(PHASES) * (E + 1), dtype=torch.int64, device=device)
            self._tokens = torch.zeros(len(PHASES), dtype=torch.int64, device=device)
            self._pairs = None
            if pairs:
                self._pairs = torch.zeros((E + 1, E + 1), dtype=torch.int64, device=device)

    def add(self, ids: torch.Tensor, phase: torch.Tensor) -> None:
        """Count a batch.

        Args:
            ids: integers [T, k]. Those that are no expert's count for nothing, and neither does a
                token that has no others.
            phase: int64 [1] on the same device, an index of `PHASES`.
        """
        E, ids = self._E, ids.detach().to(torch.int64)
        known = (ids >= 0) & (ids < E)
        ids = ids.masked_fill(~known, E)  # a place of its own, never read
        each = ids.flatten()
        self._counts.scatter_add_(0, each + phase * (E + 1), torch.ones_like(each))
        self._tokens.scatter_add_(0, phase, known.any(1).sum(0, keepdim=True))
        if self._pairs is None:
            return
        if ids.numel() * ids.shape[1] <= E:  # decode: less to add than the table is long
            both = (ids[:, :, None] * (E + 1) + ids[:, None, :]).flatten()
            self._pairs.view(-1).scatter_add_(0, both, torch.ones_like(both))
            return
        used = torch.zeros((len(ids), E + 1), device=ids.device).scatter_(1, ids, 1.0)
        self._pairs += (used.t() @ used).to(torch.int64)

    def read(self) -> tuple[Counts, Counts]:
        """([3, E] pairs of token and expert, [3] tokens) so far, when the device has got there."""
        counts = self._counts.cpu().numpy().reshape(len(PHASES), self._E + 1)[:, : self._E]
        return counts, self._tokens.cpu().numpy()

    def read_pairs(self) -> Counts:
        """[E, E] tokens that chose both, 0 on the diagonal."""
        if self._pairs is None:
            raise RuntimeError("this layer does not count pairs of experts")
        pairs: Counts = self._pairs.cpu().numpy()[: self._E, : self._E].copy()
        np.fill_diagonal(pairs, 0)
        return pairs

    def reset(self) -> None:
        """Begin again from 0, in the memory that graphs know."""
        for tensor in (self._counts, self._tokens, self._pairs):
            if tensor is not None:
                tensor.zero_()


class RoutingRecorder:
    """Counts the routing of one model.

    Args:
        model: what it is; `add` takes its layers and no others.
        pairs: whether to count pairs of experts: 8 E^2 bytes a layer on the device.
        window_tokens: of a window at first.

    Attributes:
        model: as given.
    """

    def __init__(
        self, model: RoutedModel, *, pairs: bool = True, window_tokens: int = WINDOW_TOKENS
    ) -> None:
        self.model = model
        self._count_pairs = pairs
        self._window_tokens = window_tokens
        self._layers: dict[int, LayerCounts] = {}
        self._phase = PHASES.index("unknown")
        self._phases: dict[torch.device, torch.Tensor] = {}
        L, E = len(model.layers), model.num_experts
        self._known = frozenset(model.layers)
        self._windows = np.zeros((0, L, E), np.int64)
        self._tokens = np.zeros(0, np.int64)
        self._marked = np.zeros((L, E), np.int64), 0

    def set_phase(self, phase: str) -> None:
        """What follows in the order of the current stream is of this phase.

        Raises:
            ValueError: not one of `PHASES`.
        """
        index = PHASES.index(phase)
        if index == self._phase:
            return
        self._phase = index
        for word in self._phases.values():
            word.fill_(index)

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Count what one layer's router chose.

        Args:
            layer: index in the model, one of `model.layers`.
            ids: integers [T, k] on any device; the same one in all calls for a layer.
        """
        counts = self._layers.get(layer)
        if counts is None:
            counts = self._first(layer, ids.device)
        counts.add(ids, self._phases[ids.device])

    def _first(self, layer: int, device: torch.device) -> LayerCounts:
        if layer not in self._known:
            raise ValueError(f"layer {layer} is not among the model's: {self.model.layers}")
        if device not in self._phases:
            with torch.inference_mode(False):
                self._phases[device] = torch.full((1,), self._phase, device=device)
        counts = LayerCounts(self.model.num_experts, device, pairs=self._count_pairs)
        self._layers[layer] = counts
        return counts

    def prepare(self, devices: Mapping[int, torch.device]) -> None:
        """Allocate what `add` needs, by layer: before a graph is captured, which must not."""
        for layer, device in devices.items():
            if layer not in self._layers:
                self._first(layer, device)

    def reset(self) -> None:
        """Forget what has been counted; captured graphs go on counting."""
        for layer in self._layers.values():
            layer.reset()
        self._windows, self._tokens = self._windows[:0], self._tokens[:0]
        self._marked = np.zeros_like(self._marked[0]), 0

    @property
    def window_tokens(self) -> int:
        """Tokens after which a window should end, see `mark`."""
        return self._window_tokens

    def mark(self) -> None:
        """End a window here, unless it has no tokens. Waits for the devices."""
        by_phase, tokens = self._read()
        counts, total = by_phase.sum(0), int(tokens.sum())
        before, tokens_before = self._marked
        if np.array_equal(counts, before):
            return
        self._windows = np.concatenate([self._windows, (counts - before)[None]])
        self._tokens = np.append(self._tokens, total - tokens_before)
        self._marked = counts, total
        if len(self._tokens) > MAX_WINDOWS:
            self._windows, self._tokens = merged_windows(self._windows, self._tokens)
            self._window_tokens *= 2

    def profile(self, source: str = "") -> RoutingProfile:
        """What has been counted so far. Waits for the devices.

        Args:
            source: what the tokens were, for people.
        """
        self.mark()
        by_phase, tokens = self._read()
        pairs = None
        if self._count_pairs:
            L, E = len(self.model.layers), self.model.num_experts
            pairs = np.zeros((L, E, E), np.int64)
            for at, layer in enumerate(self.model.layers):
                if layer in self._layers:
                    pairs[at] = self._layers[layer].read_pairs()
        return RoutingProfile(
            self.model,
            by_phase,
            tokens,
            pairs,
            windows=self._windows.copy(),
            window_tokens=self._tokens.copy(),
            source=source,
        )

    def _read(self) -> tuple[Counts, Counts]:
        """([3, L, E], [3]). A layer may see fewer tokens than others: the last one of a prompt."""
        L, E = len(self.model.layers), self.model.num_experts
        by_phase, tokens = np.zeros((len(PHASES), L, E), np.int64), np.zeros(len(PHASES), np.int64)
        for at, layer in enumerate(self.model.layers):
            if layer in self._layers:
                by_phase[:, at], seen = self._layers[layer].read()
                tokens = np.maximum(tokens, seen)
        return by_phase, tokens
