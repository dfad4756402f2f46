"""kt-kernel, through its extension module: its Python wrapper cannot be built without CUDA.

The class chosen for a method is the one that its own wrapper would choose on this processor. Its
task-queue thread busy-waits during a call, so it wants one core more than its threads.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import numpy as np
import torch
from problem import SCALE_GROUP, SOURCES, Array, Batch, Codes, Shape, bf16_bits, random_experts

from peer.interface import Peer, UnavailableError

_CLASSES = {
    "MXFP4": ("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"),
    "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
}
"""Best first; which exist depends on the variant that was chosen at import."""


class KtKernel(Peer):
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        kt_kernel: Any = importlib.import_module("kt_kernel")
        kt_kernel_ext: Any = kt_kernel.kt_kernel_ext
        moe = kt_kernel_ext.moe
        names = [name for name in _CLASSES.get(method, ()) if hasattr(moe, name)]
        if not names:
            raise UnavailableError(f"kt-kernel ({kt_kernel.__cpu_variant__}) has no {method} here")
        self._class_name, self._shape = names[0], shape
        torch.set_num_threads(threads)
        workers = kt_kernel_ext.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map = 1, [0]
        workers.subpool_thread_count = [threads]
        self._infer = kt_kernel_ext.CPUInfer(workers)
        config = moe.MOEConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate, 0)
        config.layer_idx, config.pool = 0, self._infer.backend_
        config.max_len = max(max_tokens, 16)
        if method == "MXFP4":
            config.quant_config.bits = 4
            config.quant_config.group_size = SCALE_GROUP
            config.quant_config.zero_point = False
        kept = self._point_at(config, random_experts(shape, method))
        self._moe = getattr(moe, self._class_name)(config)
        identity = torch.arange(shape.experts)
        self._infer.submit(self._moe.load_weights_task(identity.data_ptr()))
        self._infer.sync()
        del kept  # it has copied them

    def _point_at(self, config: Any, sources: list[dict[str, Codes]]) -> list[Array]:
        kept: list[Array] = []

        def address(array: Array) -> int:
            kept.append(np.ascontiguousarray(array))
            return int(kept[-1].ctypes.data)

        for name in self._shape.matrices:
            codes = [address(s[name].codes) for s in sources]
            scales = [self._scales(s[name], address) for s in sources]
            experts = range(self._shape.experts)
            setattr(config, f"{name}_projs", [[codes[e % SOURCES] for e in experts]])
            setattr(config, f"{name}_scales", [[scales[e % SOURCES] for e in experts]])
        return kept

    @staticmethod
    def _scales(codes: Codes, address: Any) -> int:
        """It takes MXFP4's scales as bf16."""
        if codes.scales is None:
            return 0
        return int(address(bf16_bits(np.exp2(codes.scales.astype(np.float32) - 127))))

    @property
    def label(self) -> str:
        version = importlib.metadata.version("kt-kernel")
        return f"kt-kernel {version} ({self._class_name})"

    def prepare(self, batches: list[Batch]) -> None:
        self._batches = [
            (
                torch.tensor([len(b.x)], dtype=torch.int32),
                torch.from_numpy(b.ids),
                torch.from_numpy(b.weights),
                torch.from_numpy(b.x.copy()).view(torch.bfloat16),
            )
            for b in batches
        ]
        self._y = torch.empty((len(batches[0].x), self._shape.hidden), dtype=torch.bfloat16)

    def call(self, index: int) -> None:
        count, ids, weights, x = self._batches[index]
        pointers = [t.data_ptr() for t in (ids, weights, x, self._y)]
        task = self._moe.forward_task(count.data_ptr(), self._shape.top_k, *pointers, False)
        self._infer.submit(task)
        self._infer.sync()

    def output(self) -> Array:
        array: Array = self._y.float().numpy()
        return array
