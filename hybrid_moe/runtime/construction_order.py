"""Which layers are one model, where nobody declares it: kt-kernel's contract.

kt-kernel's arguments name no model. What they do say: layers of one checkpoint are constructed one
after the other, and the last of a model gets a deferral of 0 (SGLang sees to that). So layers of
one `weight_path`, constructed by one thread with ascending indices, are a model once a layer with
a deferral of 0 has ended it, if none of them ran before that, and for as long as all of them live.
A draft layer (one that `config.json` does not count) belongs to no such model.

Everything else could be two models or copies in turns, whose experts would be added up: it defers
nothing, which is right and not as fast, and a log line says why.
"""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.model_config import CONFIG_NAME, ModelConfig
from hybrid_moe.loaders.regular import read_json
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.deferral import ChainedLayer, DeferralChain

logger = logging.getLogger(__name__)

_NO_PATH = "their weights are not from a checkpoint, so nothing says which layers are one model"
_DRAFT = "they are draft layers, which config.json does not count"
_NOT_WHOLE = "a layer of their model has been closed or dropped since"
_NOT_ENDED = "no layer with a deferral of 0 had ended their model when the first of them ran"
_OUT_OF_ORDER = (
    "layers of one checkpoint were constructed out of order, or by several threads, or before the "
    "model before was ended by a layer with a deferral of 0"
)


class ConstructedChain(DeferralChain):
    """The layers of a model that is being constructed. None defers before the model is complete.

    Args:
        flaw: why it will never be.
    """

    def __init__(self, flaw: str | None = None) -> None:
        super().__init__()
        self.flaw = flaw
        self._size: int | None = None  # layers of the complete model
        self._thread = threading.get_ident()
        self._newest = -1
        self._disputed: weakref.WeakSet[ChainedLayer] = weakref.WeakSet()

    @property
    def lives(self) -> bool:
        """Whether any of its layers is neither closed nor gone."""
        return bool(self._layers or self._disputed)

    def append(self, layer: ChainedLayer) -> None:
        """Add the next layer; one that cannot be the next leaves the model incomplete for ever."""
        if self.flaw is None and (
            layer.layer_idx <= self._newest or threading.get_ident() != self._thread
        ):
            self.flaw = _OUT_OF_ORDER
        if self.flaw is not None:
            self._disputed.add(layer)
            return
        self.join(layer)
        self._newest = layer.layer_idx

    def end(self) -> None:
        """The layer that was appended last is the model's last one."""
        self._size = len(self._layers)

    def leave(self, layer: ChainedLayer) -> None:
        """See `DeferralChain.leave`."""
        self._disputed.discard(layer)
        super().leave(layer)

    def after(self, layer_idx: int) -> int | None:
        """See `DeferralChain.after`. A layer runs: who comes now is not of this model, and whether
        a layer that is gone has a successor, nothing says."""
        if self._size == len(self._layers):
            return super().after(layer_idx)
        if self.flaw is None:
            self.flaw = _NOT_ENDED if self._size is None else _NOT_WHOLE
        return None

    def log_last(self, layer_idx: int) -> None:
        """See `DeferralChain.log_last`. A flaw is logged once in a process."""
        if self.flaw is None:
            super().log_last(layer_idx)
        elif self.flaw not in _told:
            _told.add(self.flaw)
            logger.warning(
                "layers with max_deferred_experts_per_token above 0 defer nothing: %s; give all "
                "layers of one model the same deferral_chain=hybrid_moe.DeferralChain()",
                self.flaw,
            )


_told: set[str] = set()

_Key = tuple[Path, int]
_building: weakref.WeakValueDictionary[_Key, ConstructedChain] = weakref.WeakValueDictionary()
_lock = ProcessLock()


def chain_of(layer: ChainedLayer, weight_path: Path | None, deferred: int) -> DeferralChain | None:
    """The chain of a layer that was constructed without one; None if it takes no part in deferral.

    Args:
        layer: it has joined when this returns.
        weight_path: its checkpoint, resolved.
        deferred: its deferral.
    """
    if weight_path is None:
        return ConstructedChain(_NO_PATH) if deferred else None
    key = (weight_path, layer.hidden_size)
    with _lock:
        chain = _building.get(key)
        if chain is not None and not chain.lives:
            chain = None
        if chain is None and not deferred:
            return None
        if _is_draft(layer.layer_idx, weight_path):
            return ConstructedChain(_DRAFT) if deferred else None
        if chain is None:
            chain = _building[key] = ConstructedChain()
        chain.append(layer)
        if not deferred and chain.flaw is None:
            chain.end()
            del _building[key]
        return chain


def _is_draft(layer_idx: int, weight_path: Path) -> bool:
    """Whether the checkpoint's configuration does not count this layer."""
    layers = _main_layers(weight_path)
    return layers is not None and layer_idx >= layers


def _main_layers(weight_path: Path) -> int | None:
    """The number of layers of the configuration; None where it cannot be known. What is wrong with
    a damaged one, loading will say."""
    folder = weight_path if weight_path.is_dir() else weight_path.parent
    try:
        config, _ = read_json(folder / CONFIG_NAME)
        return ModelConfig(config).num_layers
    except CheckpointError as error:
        logger.debug("%s", error)
        return None
