"""`KTMoEWrapper`: the routed experts of one MoE layer, call-compatible with kt-kernel.

    submit_forward ─► checks ─► (split off deferred experts) ─► job on the worker pool
                                                            └─► with a gpu_backend: the hot half
    sync_forward   ◄── this layer's experts + those that the layer before had deferred

One wrapper is one layer. Layers of one model share checkpoint handles, worker pools (equal
configuration), and, where experts are deferred, a `DeferralChain` through which they reach the next
layer.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.activation import Activation, activation_bits
from hybrid_moe.formats.table import chosen_method
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders.layout import gate_up_layout as layout_named
from hybrid_moe.runtime import (
    arguments,
    checkpoint_cache,
    construction_order,
    filling,
    gpu_arguments,
    torch_op,
)
from hybrid_moe.runtime.deferral import DeferralChain, declared_chain, split_deferred
from hybrid_moe.runtime.expert_export import ExpertExport
from hybrid_moe.runtime.expert_moves import ExpertMoves
from hybrid_moe.runtime.export import ExpertWriter
from hybrid_moe.runtime.filling import Fill
from hybrid_moe.runtime.hot_half import HotHalf
from hybrid_moe.runtime.packed_layers import cache_at
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.runtime.prefill_stream import PrefillStream, declared_stream
from hybrid_moe.runtime.process_wide import ProcessWide
from hybrid_moe.runtime.runner import LayerRunner
from hybrid_moe.runtime.weights import Stacked


class KTMoEWrapper(ExpertMoves, ExpertExport, ProcessWide):
    """The routed experts of one layer that are not on the GPU; with a `gpu_backend` all of them.

    Args:
        layer_idx: index of the layer in the model, dense layers counted; selects its tensors in
            the checkpoint and its place in the order of layers.
        num_experts: routed experts E.
        num_experts_per_tok: experts per token k.
        hidden_size: H, a multiple of 32.
        moe_intermediate_size: I, whole, a multiple of 32.
        gpu_experts_mask: bool [E], True for experts that the GPU computes and that are skipped
            here, or held in slots with a `gpu_backend`; None for none (or for what
            `num_gpu_experts` says).
        cpuinfer_threads: worker threads over all pools; None for one per physical core, within
            the cgroup's quota.
        threadpool_count: worker pools; None for one per NUMA node.
        weight_path: the checkpoint's directory or file; None if the weights come by
            `load_weights_from_tensors`.
        chunked_prefill_size: accepted and not needed: calls may have any number of tokens.
        max_deferred_experts_per_token: experts per token that may arrive one MoE layer later, see
            `hybrid_moe.runtime.deferral`; None for 0. The last layer of a model defers nothing.
        method: how the weights are held, see `formats.table.METHODS`; None, "auto" or "STORED" for
            the formats in which the checkpoint stores this layer.
        numa_nodes: NUMA node of each pool; None spreads them over every node.
        num_gpu_experts: the first so many ids are on the GPU; the older form of the mask.
        swiglu_limit: clamps gate to at most this and up to +- this before SwiGLU; 0 for no clamp.
        swiglu_alpha: above 0, gate * sigmoid(alpha * gate) * (up + 1) (gpt-oss) instead of
            silu(gate) * up.
        strict: ids outside 0..E-1 raise `IndexError` at `sync_forward`. Else they contribute zero
            and are counted in `ignored_ids`: runtimes pad with -1.
        isa: name of the instruction set tier; None for the best that this processor has.
        gate_up_layout: "halves" or "interleaved": where gate and up lie in a checkpoint's fused
            tensors. Needed only for experts with biases whose `config.json` is missing or names a
            model that Transformers does not know.
        gpu_backend: who computes the experts that the mask puts on the GPU. None: the caller, and
            this layer gives the sum of the others. "cute" (our kernels, on a CUDA device) or
            "torch" (their references, on any device): this layer, which then holds these experts
            in slots of the device's memory and gives the whole sum. The mask is then a report:
            `promote` and `demote` change it, and one that was changed otherwise is an error at
            the next submission. Batches must be on the device of the slots.
        gpu_slots: experts for which the device gets room; None for those of the mask.
        gpu_device: where the slots are; None for the current CUDA device, or the CPU where there is
            none ("torch").
        elsewhere: bool [E]: experts that neither half computes or holds, since another rank does.
        gpu_activation: "fp8" rounds the inputs of the hot experts' projections to E4M3 in batches
            of 256 tokens and more, as W8A8 does (what that costs: `SlotExperts.fp8_prefill`). It
            is no faster: these GEMMs multiply in bf16. None for bf16 always.
        gpu_panels: "keep" leaves experts that go to the GPU where they are on the CPU as well, so
            that coming back copies nothing; "drop" (or None) gives their places to others.
        cpu_activation: "int8" rounds the inputs of products on the CPU to 8 bits for each group of
            32, which is up to twice as fast with many tokens and less exact (docs/numerics.md); for
            weights that are integers. None for 16 bits.
        formats: the weight formats themselves, for a layer that is loaded by `load_weights_by` and
            whose formats no method names; `method` is left out of account then.
        cache: a directory for packed layers, see `loaders.packed_cache`: `load_weights` reads a
            layer from there, or leaves it there for the next time. None for none.
        deferral_chain: the model that the layer belongs to: one object for all of its layers and
            no others. None: the order of construction decides, see `runtime.construction_order`;
            where that says nothing, the layer defers nothing.
        prefill_stream: with a `gpu_backend`: sends cold experts to the GPU for a batch; one object
            for all layers of a model. None: the CPU computes them all.

    The remaining options are kt-kernel's for training and for files that this package does not
    write; other values than their defaults raise `ValueError`.

    Raises:
        TypeError, ValueError: an argument; the message names it.
        FileNotFoundError: `weight_path` does not exist.

    A submission is followed by its sync. Where a step fails in between, `reset` drops what is under
    way; without it the next submission drops it and raises, once.

    One thread at a time may call the methods of one wrapper.
    """

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike[str] | None = None,
        chunked_prefill_size: int | None = None,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str | None = "MXFP4",
        numa_nodes: list[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        group_size: int = 128,
        zero_point: bool = True,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        *,
        strict: bool = False,
        isa: str | None = None,
        gate_up_layout: str | None = None,
        deferral_chain: DeferralChain | None = None,
        gpu_backend: str | None = None,
        gpu_slots: int | None = None,
        gpu_device: torch.device | str | int | None = None,
        elsewhere: torch.Tensor | None = None,
        gpu_activation: str | None = None,
        gpu_panels: str | None = None,
        cpu_activation: str | None = None,
        formats: LayerFormats | None = None,
        cache: str | os.PathLike[str] | None = None,
        prefill_stream: PrefillStream | None = None,
    ) -> None:
        arguments.refuse_unsupported(locals())
        self._method = None if formats is not None else chosen_method(method)
        self._layout = layout_named(gate_up_layout)
        self.activation = Activation(
            limit=arguments.number("swiglu_limit", swiglu_limit),
            alpha=arguments.number("swiglu_alpha", swiglu_alpha),
        )
        self.shape = arguments.LayerShape.of(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
        )
        self.weight_path = arguments.existing_path(weight_path)
        self._cache = cache_at(cache)
        self.formats = formats or checkpoint_cache.formats_of(
            self.weight_path, self.layer_idx, self._method
        )
        self.shape.check(self.formats)
        self.max_deferred_experts_per_token = arguments.deferred_experts(
            max_deferred_experts_per_token, self.shape
        )
        with torch.inference_mode(False):  # else only inference mode could change the mask later
            self._mask = arguments.expert_mask(gpu_experts_mask, num_gpu_experts, self.num_experts)
            if torch.cuda.is_available():
                self._mask = self._mask.pin_memory()
        options = gpu_arguments.hot_options(
            gpu_backend,
            gpu_slots,
            gpu_device,
            elsewhere,
            gpu_activation,
            gpu_panels,
            self._mask,
            self.shape,
        )
        self._prefill_stream = declared_stream(prefill_stream, options)
        self._hot = None
        if options is not None:
            self._hot = HotHalf(options, self.shape, self.formats, self.activation)
        self.pool = arguments.pool_config(cpuinfer_threads, threadpool_count, numa_nodes)
        self.strict = strict
        self._isa = arguments.tier_name(isa)
        self._activation_bits = activation_bits(cpu_activation)
        self._layer = self._new_layer()  # holds no memory yet; checks sizes and isa
        self._runner: LayerRunner | None = None
        self._handle = torch_op.Handle(self, KTMoEWrapper._forward_now)
        self._closed = False
        self._chain = declared_chain(deferral_chain)
        if self._chain is not None:
            self._chain.join(self)
        else:
            self._chain = construction_order.chain_of(
                self, self.weight_path, self.max_deferred_experts_per_token
            )

    # Loading ------------------------------------------------------------------------------------

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Read the experts that this layer computes from the checkpoint into packed strips.

        Args:
            physical_to_logical_map_cpu: int64 [E] on the CPU: expert `map[i]` of the checkpoint is
                id i of `topk_ids`. None for the identity.

        Raises:
            RuntimeError: weights are loaded already, or the wrapper is closed.
            ValueError: no `weight_path`, a map of wrong shape or range, or weights that do not
                become the method's format.
            CheckpointError: a tensor is missing, damaged, or does not fit the layer.
        """
        self._check_not_loaded()
        if self.weight_path is None:
            raise ValueError("load_weights needs the weight_path that the wrapper was made without")
        mapping = arguments.expert_map(physical_to_logical_map_cpu, self.num_experts)
        source = self.checkpoint_source()
        self._load(filling.from_checkpoint(source, self.formats, mapping, self._cache))

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
        *,
        gate_scale: torch.Tensor | None = None,
        up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> None:
        """Pack the experts that this layer computes from stacked tensors, quantising floats.

        Args:
            gate_proj, up_proj: float [E', I, H], or codes of the method's format (uint8 [E', I,
                H/2] for MXFP4, float8_e4m3fn [E', I, H] for FP8).
            down_proj: float [E', H, I], or codes, likewise.
            physical_to_logical_map_cpu: as for `load_weights`, into the E' experts given.
            gate_scale, up_scale, down_scale: with codes: theirs ([E', N, K/32] E8M0 for MXFP4), of
                the type and shape that the format's row of `formats.table` says.
            gate_bias, up_bias: float [E', I]. down_bias: float [E', H].

        Raises:
            RuntimeError: weights are loaded already, or the wrapper is closed.
            TypeError, ValueError: a tensor's dtype or shape; the message names it.
            CheckpointError: a value is not finite.
        """
        self._check_not_loaded()
        mapping = arguments.expert_map(physical_to_logical_map_cpu, self.num_experts)
        stacked = {
            "gate": Stacked(gate_proj, gate_scale, gate_bias),
            "up": Stacked(up_proj, up_scale, up_bias),
            "down": Stacked(down_proj, down_scale, down_bias),
        }
        self._load(filling.from_tensors(stacked, self.shape, self.formats, mapping))

    def load_weights_by(self, fill: Fill) -> None:
        """Load the experts that this layer computes by a function of `runtime.filling`.

        Raises:
            RuntimeError: weights are loaded already, or the wrapper is closed.
        """
        self._check_not_loaded()
        self._load(fill)

    def unpack(self, expert: int) -> ExpertTensors:
        """A copy of an expert that this layer holds, bit for bit as it was loaded. No submission
        may be under way.

        Raises:
            RuntimeError: nothing is loaded. IndexError: this expert is not.
        """
        index = arguments.integer("expert", expert)
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert is {index}, must be in 0..{self.num_experts - 1}")
        return self._loaded_runner().unpack(index)

    def _check_not_loaded(self) -> None:
        self._check_open()
        if self.loaded:
            raise RuntimeError(
                f"layer {self.layer_idx} has its weights already; make a new wrapper to load others"
            )

    def _new_layer(self) -> ExpertLayer:
        return ExpertLayer(
            self.formats,
            self.num_experts,
            self.hidden_size,
            self.moe_intermediate_size,
            pool=self.pool,
            activation=self.activation,
            activation_bits=self._activation_bits,
            isa=self._isa,
            name=f"experts layer {self.layer_idx}",
        )

    def _load(self, fill: Fill) -> None:
        """Load the experts that this layer computes; nothing stays behind if that fails."""
        try:
            mask, resident, halves = self._fill(fill)
            self._writer = ExpertWriter(self._layer, self.shape)
            self._runner = LayerRunner(
                self._layer,
                self.shape,
                mask,
                resident,
                self._chain,
                deferred=self.max_deferred_experts_per_token,
                strict=self.strict,
                halves=halves,
                prefill_stream=self._prefill_stream,
            )
        except BaseException:
            self._layer.close()
            self._layer = self._new_layer()
            if self._hot is not None:
                self._hot.release()
            raise

    def _fill(
        self, fill: Fill
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_], tuple[HotHalf, ExpertPlacement] | None]:
        """Load the weights: (what tells the CPU's jobs which experts to skip, those that are
        loaded on the CPU, and the other half)."""
        hot = self._hot
        if hot is None:
            wanted = ~self._mask.numpy()
            if wanted.any():
                fill(self._layer, wanted)
            return self._mask, wanted, None
        placement = ExpertPlacement(self._layer, hot, self._mask, self.layer_idx)
        wanted = ~hot.options.elsewhere.numpy()
        if wanted.any():
            fill(placement, wanted)
        placement.ready()
        return placement.live, placement.resident, (hot, placement)

    # Running ------------------------------------------------------------------------------------

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> None:
        """Start the layer on a batch. The tensors may be changed when this returns (CUDA: in the
        order of the stream). A CPU batch of more than 2048 tokens runs part by part in the same
        memory, and this returns when only the last part is left.

        Args:
            hidden_states: bfloat16 [B, H], any strides, B may be 0.
            topk_ids: int64 or int32 [B, k]. Ids below 0, at and above E, and of experts that
                others compute (by the mask without a `gpu_backend`, by `elsewhere` with one)
                contribute zero.
            topk_weights: float [B, k].
            cuda_stream: the `cudaStream_t` as int for CUDA tensors; unused for CPU tensors.

        Raises:
            RuntimeError: not loaded or closed; or the submission before was not synced, or layers
                with deferred experts are called out of order: what was under way is dropped, and
                the next submission starts clean.
            TypeError, ValueError: a tensor's dtype, shape or device; the message names it.
        """
        runner = self._runner or self._loaded_runner()
        torch_op.untraced(runner.submit)(hidden_states, topk_ids, topk_weights, cuda_stream)

    def sync_forward(
        self, hidden_states: torch.Tensor, cuda_stream: int | None = None
    ) -> torch.Tensor:
        """The sum over the CPU's experts of weight times expert, for the batch submitted last; with
        a `gpu_backend` over all experts.

        Args:
            hidden_states: [B, H], of which only shape and device count.
            cuda_stream: as for `submit_forward`; the result is ordered on it.

        Returns:
            bfloat16 [B, H] on the device of the batch; a new tensor that the caller owns.

        Raises:
            RuntimeError: nothing was submitted; an id was routed to an expert that is neither on
                the GPU by the mask nor loaded; a worker failed.
            IndexError: `strict`, and ids were out of range.
        """
        runner = self._runner or self._loaded_runner()
        return torch_op.untraced(runner.sync)(hidden_states, cuda_stream)

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> torch.Tensor:
        """`submit_forward` and `sync_forward` in one. Nothing stays under way if it fails.

        In a graph that is captured (`torch.compile`, `torch.export`, `make_fx`) it is one node, see
        `runtime.torch_op`. With deferred experts it breaks the graph, as `submit_forward` and
        `sync_forward` do: what they return depends on the call before.
        """
        if torch_op.is_traced(hidden_states) and not self.max_deferred_experts_per_token:
            return torch_op.experts(
                hidden_states, topk_ids, topk_weights, self._handle.value, cuda_stream
            )
        return self._forward_now(hidden_states, topk_ids, topk_weights, cuda_stream)

    def _forward_now(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None,
    ) -> torch.Tensor:
        try:
            runner = self._runner or self._loaded_runner()
            submit = torch_op.untraced(runner.submit)
            submit(hidden_states, topk_ids, topk_weights, cuda_stream, unchanged=True)
            return self.sync_forward(hidden_states, cuda_stream)
        except BaseException:
            self.drop()
            raise

    __call__ = forward

    def reset(self) -> None:
        """Drop what a step left under way that failed between submit and sync: this layer's
        submission, and with a deferral chain those of all its layers and what is deferred between
        them. Waits for workers; does nothing where nothing is under way."""
        if self._runner is not None:
            torch_op.untraced(self._runner.reset)()

    def drop(self) -> None:
        """`reset` of this layer alone."""
        if self._runner is not None:
            torch_op.untraced(self._runner.drop)()

    def select_deferred_experts(
        self, expert_ids: torch.Tensor, expert_scores: torch.Tensor, protected_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(immediate, deferred) ids, see `hybrid_moe.runtime.deferral.split_deferred`."""
        self._check_open()
        return split_deferred(expert_ids, expert_scores, protected_k, self.num_experts)

    def close(self) -> None:
        """Free the weights, and drop what is under way. Afterwards whatever loads or computes
        raises `RuntimeError`; closing again does nothing."""
        self._closed = True
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
            self._writer.close()
        try:
            if self._hot is not None:
                self._hot.release()  # raises where the GPU is lost
        finally:
            if self._chain is not None:
                self._chain.leave(self)
            self._layer.close()

    def __reduce__(self) -> str:
        raise TypeError("a KTMoEWrapper cannot be copied or pickled: it owns threads and memory")
