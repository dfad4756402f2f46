"""What can be asked about one layer of a model: the part of `KTMoEWrapper` that only tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.table import Method
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.runtime import arguments, checkpoint_cache
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.hot_half import HotHalf
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.runtime.runner import LayerRunner


class LayerFacts:
    """Sizes, placement and counters of a wrapper, which provides the attributes.

    Attributes:
        shape: its sizes.
        weight_path: the checkpoint; None without one.
        formats: its weight formats, which are alike in most checkpoints.
    """

    shape: LayerShape
    weight_path: Path | None
    formats: LayerFormats
    _method: Method | None
    _layout: GateUp | None
    _mask: torch.Tensor
    _layer: ExpertLayer
    _hot: HotHalf | None
    _prefill_stream: PrefillStream | None
    _runner: LayerRunner | None  # None before loading and after closing
    _closed: bool

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        return self.shape.layer_idx

    @property
    def num_experts(self) -> int:
        """Routed experts E."""
        return self.shape.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """Experts per token k."""
        return self.shape.num_experts_per_tok

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.shape.hidden_size

    @property
    def moe_intermediate_size(self) -> int:
        """I."""
        return self.shape.moe_intermediate_size

    @property
    def method(self) -> str:
        """Name of the method, or of the weight formats where the checkpoint decides."""
        return self.formats.name if self._method is None else self._method.name

    @property
    def format(self) -> WeightFormat:
        """The weight format of gate and up."""
        return self.formats.gate_up

    def checkpoint_source(self) -> ExpertSource:
        """This layer of the checkpoint at `weight_path`, checked: only headers are read.

        Raises:
            ValueError: there is no `weight_path`, or its weights do not become the method's.
            CheckpointError: it is damaged, or does not fit the layer.
        """
        if self.weight_path is None:
            raise ValueError("load_weights needs the weight_path that the wrapper was made without")
        return checkpoint_cache.checked_layer(
            self.weight_path, self.shape, self.formats, self._method, self._layout
        )

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """bool [E] on the CPU: experts that the GPU computes. With a `gpu_backend`, `promote` and
        `demote` change it, and nobody else. Without: change it in place; assignment copies into it.
        Every submission works on the mask as it was when it was submitted; on CUDA
        tensors: when its stream came to it, so that a non-blocking copy from the GPU on that stream
        changes the mask together with what the GPU itself goes by."""
        return self._mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: torch.Tensor) -> None:
        arguments.check_mask(mask, self.num_experts)
        if self._hot is not None and self.loaded:
            raise ValueError(
                "gpu_experts_mask cannot be assigned with a gpu_backend: promote(expert) and "
                "demote(expert) move the weights and change it"
            )
        self._mask.copy_(mask)

    @property
    def num_gpu_experts(self) -> int:
        """Experts that the mask puts on the GPU now."""
        return int(self._mask.sum())

    @property
    def mask_epoch(self) -> int:
        """How many changes of the mask the latest run had seen; 0 before the first. On CUDA tensors
        it is known when the run's results have arrived."""
        return 0 if self._runner is None else self._runner.mask_epoch

    @property
    def loaded(self) -> bool:
        """Whether weights are loaded."""
        return self._runner is not None

    @property
    def ignored_ids(self) -> int:
        """Ids outside 0..E-1 in all calls so far. With deferral on CUDA tensors not counted."""
        return 0 if self._runner is None else self._runner.ignored_ids

    @property
    def pairs(self) -> tuple[int, int]:
        """(Token, expert) pairs so far: of experts on the GPU by the mask, and of experts on the
        CPU; ids out of range are in neither. On CUDA tensors they are counted when the CPU has
        routed them. Where the CPU has no expert at all, its part is not run: then ids out of range
        count, and replays of graphs do not."""
        return (0, 0) if self._runner is None else self._runner.pairs

    @property
    def routed(self) -> npt.NDArray[np.int64]:
        """int64 [E]: (token, expert) pairs of each expert in all calls so far, wherever the expert
        is; the counters themselves, which grow as calls are routed (replays of graphs too), and are
        not to be written. Where the CPU has no expert at all nothing is counted."""
        return self._layer.routed

    @property
    def elsewhere(self) -> torch.Tensor:
        """bool [E] on the CPU, a copy: experts that neither half computes."""
        if self._hot is None:
            return self._mask.clone()
        return self._hot.options.elsewhere.clone()

    @property
    def gpu_slots(self) -> int:
        """Experts for which the GPU has room; 0 without a `gpu_backend`."""
        return 0 if self._hot is None else self._hot.options.slots

    @property
    def keeps_panels(self) -> bool:
        """Whether the CPU keeps experts that are on the GPU, so that demotions copy nothing."""
        return self._hot is not None and self._hot.options.keep_panels

    @property
    def prefill_stream(self) -> PrefillStream | None:
        """What sends experts to the GPU for a batch; None without."""
        return self._prefill_stream

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one expert in a slot, which a promotion copies; 0 where nothing is reserved."""
        return 0 if self._hot is None else self._hot.nbytes // max(1, self._hot.options.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights held on the CPU."""
        return self._layer.nbytes

    @property
    def gpu_nbytes(self) -> int:
        """Bytes of the slots on the GPU; 0 without a `gpu_backend`."""
        return 0 if self._hot is None else self._hot.nbytes

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                f"layer {self.layer_idx} is closed and its weights are freed: make a new wrapper"
            )

    def _loaded_runner(self) -> LayerRunner:
        self._check_open()
        if self._runner is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no weights: call load_weights before forward"
            )
        return self._runner
