"""Experts of a Transformers model that change places while it generates.

A step of the model begins where its first split layer gets a batch: there `OnlinePlacement` looks
and swaps, for all layers. Other threads may be at other layers then, so each layer is swapped under
its own lock. Where a graph replays the model, none of this runs, and experts stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.split_experts import SplitExperts
from hybrid_moe.placement.online import (
    MovableLayer,
    OnlineOptions,
    OnlinePlacement,
    OnlineReport,
)

if TYPE_CHECKING:
    from hybrid_moe.wrapper import KTMoEWrapper


class ModelMoves:
    """What a model's first split layer calls before each batch.

    Attributes:
        online: decides.
    """

    def __init__(self, splits: list[SplitExperts], options: OnlineOptions) -> None:
        layers = [cast(MovableLayer, _LockedLayer(split)) for split in splits]
        self.online = OnlinePlacement(layers, options)
        self._device = splits[0].device

    def __call__(self) -> None:
        """Between two steps."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self.online.step()


class _LockedLayer:
    """A split layer's wrapper, which moves experts under the layer's lock and on the stream that is
    current on its device. It does not know the layer, which may know it."""

    def __init__(self, split: SplitExperts) -> None:
        self._wrapper: KTMoEWrapper = split.wrapper
        self._lock, self._device = split.lock, split.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def promote(self, expert: int, cuda_stream: int | None = None) -> None:
        """See `KTMoEWrapper.promote`."""
        with self._lock:
            self._wrapper.promote(expert, self._stream)

    def demote(self, expert: int, cuda_stream: int | None = None) -> None:
        """See `KTMoEWrapper.demote`."""
        with self._lock:
            self._wrapper.demote(expert, self._stream)

    @property
    def _stream(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).cuda_stream


def moving_options(dynamic: Any, gpu_experts: Any) -> OnlineOptions | None:
    """What `dynamic` of `offload` says; None where experts stay.

    Raises:
        TypeError, ValueError: it is something else, or no experts are on a GPU.
    """
    options = OnlineOptions.of(dynamic)
    if options is not None and gpu_experts is None:
        raise ValueError(
            f"dynamic is {dynamic!r}, but no expert is to be on a GPU: gpu_experts says how many "
            "there are"
        )
    return options


def let_experts_move(model: torch.nn.Module, options: OnlineOptions) -> None:
    """From the next step on. A model whose experts are all in one place has nothing to move."""
    splits = _splits(model)
    if splits:
        splits[0].before_step = ModelMoves(splits, options)


def online_report(model: torch.nn.Module) -> OnlineReport | None:
    """What moving experts has done; None for a model whose experts stay."""
    for split in _splits(model):
        if isinstance(split.before_step, ModelMoves):
            return split.before_step.online.report()
    return None


def _splits(model: torch.nn.Module) -> list[SplitExperts]:
    """In the order of layers."""
    found = [
        module.layer
        for module in model.modules()
        if isinstance(module, HybridExperts) and isinstance(module.layer, SplitExperts)
    ]
    return sorted(found, key=lambda split: split.wrapper.layer_idx)
