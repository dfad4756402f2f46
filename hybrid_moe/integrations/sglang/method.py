"""`KTEPWrapperMethod`: a layer's hot experts by SGLang's own method, its cold ones on the CPU.

    ids ──► submit to KTMoEWrapper (cold experts) ─────────────────────────┐
      └──► slots ──► the wrapped method of SGLang (hot experts) ──► output + sync ──► * factor

With `HYBRID_MOE_GPU` the wrapper has the hot experts too, on each rank its share, and SGLang none:
its parameters exist, for its models look for their names, with room for no expert.

    ids ──► submit to KTMoEWrapper (cold and hot experts) ──► sync ──► * factor

SGLang's class of this name runs kt-kernel. This one takes its place (see `plugin`) and differs:

* any set of experts can be hot, and the GPU allocates slots for these only, for every method;
* the activation's clamp and slope reach the CPU, and true sizes where the GPU's are padded;
* `routed_scaling_factor` is applied once: by the router where the wrapped method wants that, else
  here on the sum, and never by the wrapped method's runner;
* a layer without hot experts does not call the wrapped method, one without cold experts (and every
  layer of a draft model) has no CPU side;
* what would be wrong is refused with a reason (`expert_layer.check_server`).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.utils import is_cuda

from hybrid_moe.integrations.sglang import (
    cpu_activation,
    dynamic,
    expert_layer,
    gpu_backend,
    gpu_experts,
    numa_binding,
)
from hybrid_moe.integrations.sglang.expert_layer import ExpertLayerSpec, UnsupportedLayerError
from hybrid_moe.integrations.sglang.gpu_experts import GpuExperts, RankExperts
from hybrid_moe.integrations.sglang.model_chain import TARGET_MODEL
from hybrid_moe.integrations.sglang.server_profile import chosen as chosen_profile
from hybrid_moe.integrations.sglang.slot_loading import physical_to_logical, slot_loader
from hybrid_moe.integrations.sglang.step_faults import STEP_FAULTS, named_options
from hybrid_moe.runtime.torch_op import untraced
from hybrid_moe.schedule.quality import deferral_depth, quality
from hybrid_moe.wrapper import KTMoEWrapper

logger = logging.getLogger(__name__)

RELOADING = (
    "weights cannot be updated while the server runs with --kt-*: the experts on the CPU would "
    "keep the old ones"
)


class KTEPWrapperMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The method of a `FusedMoE` with `--kt-*`. SGLang compares the class's name: it must stay.

    Args:
        gpu_method: SGLang's method for the layer's weight format.
        kt_config: SGLang's `KTConfig` of the layer.

    Attributes:
        gpu_backend: see `gpu_backend.chosen`; None where SGLang computes the hot experts.
        moving: how experts change places; None where they stay.
        experts: the experts in SGLang's slots, and all others; known from `create_weights` on.
        wrapper: the others; None on ranks that have none of them.

    Raises:
        ValueError: the environment variable's value.
    """

    def __init__(self, gpu_method: Any, kt_config: Any) -> None:
        self.gpu_method = gpu_method
        self.kt_config = kt_config
        self.gpu_backend = gpu_backend.chosen()
        self.moving = dynamic.chosen(self.gpu_backend)
        self.wrapper: KTMoEWrapper | None = None
        self.experts: GpuExperts
        self._spec: ExpertLayerSpec
        self._table: torch.Tensor
        self._factor = 1.0
        self._profile = chosen_profile()

    # Building and loading -----------------------------------------------------------------------

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate slots for the hot experts, and make the wrapper."""
        config = self.kt_config
        if layer.is_draft:
            logger.info("layer %d of a draft model: all experts on the GPU", config.layer_idx)
            hot = self.experts = GpuExperts(num_experts, tuple(range(num_experts)))
        else:
            expert_layer.check_server(layer)
            hot = gpu_experts.choose(config.layer_idx, num_experts, config.num_gpu_experts)
            self.experts = hot if self.gpu_backend is None else GpuExperts(num_experts, ())
        if not self.experts.all_hot:
            self._spec = expert_layer.layer_spec(
                layer, num_experts, extra_weight_attrs.get("moe_intermediate_size")
            )
            if self.gpu_backend is None and layer.moe_tp_rank == 0:
                self.wrapper = self._make_wrapper(hot)
            layer._derived_weight_cache_error = RELOADING
        # Several methods size their parameters by the layer's count, not by the argument.
        layer.num_local_experts = self.experts.count
        self.num_gpu_experts = self.gpu_method.num_gpu_experts = self.experts.count
        extra_weight_attrs["weight_loader"] = slot_loader(
            layer, self.experts, extra_weight_attrs["weight_loader"]
        )
        self.gpu_method.create_weights(
            layer=layer,
            num_experts=self.experts.count,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            params_dtype=params_dtype,
            **extra_weight_attrs,
        )
        if self.gpu_backend is not None and not self.experts.all_hot:
            self._take_both_halves(layer, hot)

    def _take_both_halves(self, layer: Any, hot: GpuExperts) -> None:
        """Make the wrapper of this rank's experts, wherever they are. Its slots are allocated now:
        SGLang gives its cache what is free after loading."""
        index, device = self.kt_config.layer_idx, next(layer.parameters()).device
        expert_layer.check_graphs(self.gpu_backend, device)
        own = RankExperts.of(hot, index, layer.moe_tp_rank, layer.moe_tp_size)
        if own.any:
            with named_options():
                self.wrapper = self._make_wrapper(
                    own.hot,
                    any_cold=own.any_cold,
                    gpu_backend=self.gpu_backend,
                    gpu_device=device,
                    elsewhere=own.elsewhere,
                    gpu_panels=None if self.moving is None else self.moving.panels,
                )
                self.wrapper.reserve_slots()

    def _make_wrapper(
        self, hot: GpuExperts, any_cold: bool = True, **both_halves: Any
    ) -> KTMoEWrapper:
        config, spec = self.kt_config, self._spec
        deferred = config.max_deferred_experts_per_token
        if deferred is None:
            deferred = deferral_depth(quality(), spec.top_k)
        last = config.num_layers is not None and config.layer_idx == config.num_layers - 1
        if last or not any_cold:
            deferred = 0
        threads, pools = config.cpuinfer_threads, config.threadpool_count
        if any_cold:
            _take_back_the_machine()
        else:  # they only load the slots, perhaps in a process that has a part of the machine
            threads, pools = None, 1
        wrapper = KTMoEWrapper(
            layer_idx=config.layer_idx,
            num_experts=spec.num_experts,
            num_experts_per_tok=spec.top_k,
            hidden_size=spec.hidden_size,
            moe_intermediate_size=spec.intermediate_size,
            gpu_experts_mask=hot.mask,
            cpuinfer_threads=threads,
            threadpool_count=pools,
            weight_path=config.weight_path,
            chunked_prefill_size=config.chunked_prefill_size,
            max_deferred_experts_per_token=deferred,
            method=config.method,
            swiglu_limit=spec.swiglu_limit,
            swiglu_alpha=spec.swiglu_alpha,
            cpu_activation=cpu_activation.chosen() if any_cold else None,
            deferral_chain=TARGET_MODEL.chain_of(config.layer_idx),
            prefill_stream=TARGET_MODEL.prefill_stream() if both_halves and any_cold else None,
            **both_halves,
        )
        if wrapper.weight_path is not None:  # of every layer, before the first one is loaded
            wrapper.checkpoint_source()
        return wrapper

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """Let the wrapped method build its runner, for the slots and without the factor."""
        # Changed in place: layer, dispatcher and runner share this object, now and later.
        factor, moe_runner_config.routed_scaling_factor = (
            moe_runner_config.routed_scaling_factor,
            None,
        )
        moe_runner_config.num_local_experts = self.experts.count
        self.gpu_method.create_moe_runner(layer, moe_runner_config)
        self.runner = self.gpu_method.runner
        backend = self.gpu_method.get_moe_runner_backend(layer)
        # What SGLang will ask of the router, asked of the method that it would ask without us.
        self.fuse_routed_scaling_factor_in_topk = bool(
            fused_moe._fuses_routed_scaling_factor_in_topk(self.gpu_method, backend)
        )
        if is_cuda() and not self.fuse_routed_scaling_factor_in_topk:
            self._factor = float(factor or 1.0)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let the wrapped method finish its weights, and load the wrapper's."""
        if self.experts.count:
            self.gpu_method.process_weights_after_loading(layer)
        device = next(layer.parameters()).device
        self._table = self.experts.slot_table(device)
        if layer.is_draft or layer.moe_tp_rank:
            self._profile = None
        elif self._profile is not None:
            weights = self.kt_config.weight_path
            self._profile.join(layer, self.experts.num_experts, device, weights)
        if self.wrapper is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # frees what loading holds, before memory is taken
            with named_options():
                self.wrapper.load_weights(physical_to_logical(layer, self.experts.num_experts))
            if self.moving is not None:
                dynamic.MOVING.join(self.wrapper, self.moving)

    def restore_weights_before_loading(self, layer: Any) -> None:
        """As the wrapped method does; never reached with experts on the CPU (`RELOADING`)."""
        self.gpu_method.restore_weights_before_loading(layer)

    def get_moe_runner_backend(self, layer: Any) -> Any:
        """The wrapped method's."""
        return self.gpu_method.get_moe_runner_backend(layer)

    def get_moe_routing_method_type(self, layer: Any, requested_method: Any) -> Any:
        """The wrapped method's."""
        return self.gpu_method.get_moe_routing_method_type(layer, requested_method)

    # Running ------------------------------------------------------------------------------------

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The layer on a batch: the experts in SGLang's slots and the wrapper's at the same time,
        and their sum."""
        dispatch_output = with_standard_routing(dispatch_output)
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        if self._profile is not None:
            untraced(self._profile.add)(layer.layer_id, topk.topk_ids)
        running = self.submit(x, topk)
        try:
            hot = self._hot_output(layer, dispatch_output)
        except BaseException:
            if self.wrapper is not None:
                self.wrapper.reset()
            raise
        output = self._with_cold(hot, x, running)
        if self._factor != 1.0:
            output *= self._factor
        return StandardCombineInput(hidden_states=output)

    def submit(self, x: torch.Tensor, topk: Any) -> bool:
        """Start the wrapper's experts; False if a fault has been met instead, perhaps of a step
        before, which is kept. Inputs may be overwritten when this returns."""
        if self.wrapper is None:
            return False
        if x.shape[-1] != self._spec.hidden_size:
            x = x[:, : self._spec.hidden_size]
        try:
            self.wrapper.submit_forward(x, topk.topk_ids, topk.topk_weights, _stream_of(x))
        except (RuntimeError, IndexError) as error:
            STEP_FAULTS.keep(error)
            return False
        return True

    def _hot_output(self, layer: Any, dispatch_output: Any) -> torch.Tensor | None:
        """The share of the experts in SGLang's slots; None if there are none."""
        if not self.experts.count:
            return None
        topk = dispatch_output.topk_output
        if not self.experts.all_hot:
            slots = self.experts.to_slots(topk.topk_ids, self._table)
            # A new object also drops ids that are packed together with their weights.
            topk = StandardTopKOutput(topk.topk_weights, slots, topk.router_logits)
            dispatch_output = dispatch_output._replace(topk_output=topk)
        combined = self.gpu_method.apply(layer, dispatch_output)
        output: torch.Tensor = combined.hidden_states
        return output

    def _with_cold(self, hot: torch.Tensor | None, x: torch.Tensor, running: bool) -> torch.Tensor:
        """The share of SGLang's experts and, where they are running, the wrapper's. Where these met
        a fault, the step's requests fail, and its values count for nothing."""
        if self.wrapper is None or not running:
            return torch.zeros_like(x) if hot is None else hot
        hidden = self._spec.hidden_size
        try:
            cold = self.wrapper.sync_forward(x[:, :hidden], _stream_of(x))
        except (RuntimeError, IndexError) as error:
            STEP_FAULTS.keep(error)
            return torch.zeros_like(x) if hot is None else hot
        if hot is not None:
            hot[:, :hidden] += cold
            return hot
        if x.shape[-1] == hidden:
            return cold
        return torch.nn.functional.pad(cold, (0, x.shape[-1] - hidden))

    def __getattr__(self, name: str) -> Any:
        """What SGLang asks of a layer's method that is not here, the wrapped method answers."""
        if name.startswith("__") or name == "gpu_method":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.gpu_method, name)


@functools.cache
def _take_back_the_machine() -> None:
    """Once, before the first workers are made; see `numa_binding`."""
    numa_binding.widen(getattr(fused_moe.get_server_args(), "numa_node", None))


def with_standard_routing(dispatch_output: Any) -> Any:
    """A batch whose routing is ids and weights; routing that is still to be done is done.

    Raises:
        UnsupportedLayerError: a form of routing that does not name experts.
    """
    topk = dispatch_output.topk_output
    if TopKOutputChecker.format_is_bypassed(topk):
        return dispatch_output._replace(topk_output=topk.to_standard())
    if not TopKOutputChecker.format_is_standard(topk):
        raise UnsupportedLayerError(
            f"--kt-*: routing comes as {type(topk).__name__}, must be ids and weights: choose "
            "--moe-runner-backend triton or marlin"
        )
    return dispatch_output


def _stream_of(x: torch.Tensor) -> int | None:
    """The stream that SGLang runs on, as `KTMoEWrapper` takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
