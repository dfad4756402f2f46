"""SGLang plugin: `--kt-*` on a stock SGLang runs the cold experts with this package.

SGLang calls `register` (entry point group `sglang.srt.plugins`) in each of its processes.

    plugin          whether to take over, and putting our names where SGLang looks
    late            acting on a module of SGLang when it is imported
    contract        what we rely on in SGLang, checked before anything is replaced
    method          the layer's method: hot experts on the GPU, others in `KTMoEWrapper`
    gpu_backend     who computes the experts on the GPU: SGLang's kernels or this package's
    gpu_experts     which experts of a layer are hot, their slots on the GPU, and each rank's share
    slot_loading    SGLang's weight loaders, for experts that live in slots
    server_metrics  this package's counts at SGLang's /metrics
    server_profile  HYBRID_MOE_PROFILE: which experts a running server uses, in a file
    dynamic         experts change places between steps
    step_faults     a fault fails the requests of its step, not the server, where that can go on
    expert_layer    what SGLang says about a layer, in `KTMoEWrapper`'s terms, or why not
    model_chain     which layers are one model, for deferral
    numa_binding    what SGLang's binding to one NUMA node costs, and taking it back

Nothing here imports SGLang before the first layer with `--kt-*` is made.
"""

from __future__ import annotations


def register() -> None:
    """Put this package's experts behind SGLang's `--kt-*` options; see `plugin.register`."""
    from hybrid_moe.integrations.sglang.plugin import register as register_plugin

    register_plugin()
