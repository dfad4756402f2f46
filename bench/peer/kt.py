"""kt-kernel's CPU experts, driven through its extension module: its Python wrapper cannot be
constructed without CUDA.

The class chosen for a method is the one that its own wrapper would choose on this processor, for
the variant of `KT_KERNEL_CPU_VARIANT` where that is set. Its task-queue thread busy-waits during a
call, so it wants one core more than its threads.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from problem import SOURCES, Array, Batch, Shape, bf16_bits
from weights import Codes, random_experts

from peer.interface import Peer, UnavailableError

_TOKENS = 64
"""Its integer classes want room for a multiple of so many."""
Scales = Callable[[Codes], Array | None]


def _as_bf16_powers(codes: Codes) -> Array:
    """MXFP4's scales as bf16."""
    assert codes.scales is not None
    return bf16_bits(np.exp2(codes.scales.astype(np.float32) - 127))


def _folded(codes: Codes) -> Array:
    """NVFP4's, times the tensor's factor, as bf16."""
    s, _ = codes.fmt.factors(codes.planes)  # type: ignore[misc]
    return bf16_bits(s.astype(np.float32))


def _transposed(codes: Codes) -> Array:
    """GPTQ's: float32 [K / group, N]."""
    assert codes.scales is not None
    return np.ascontiguousarray(codes.scales.astype(np.float32).T)


def _gptq_codes(codes: Codes) -> Array:
    """Its int32 [K / 8, N], eight inputs in a word."""
    return np.ascontiguousarray(codes.codes.view(np.uint32).T)


def _plain(codes: Codes) -> Array:
    return codes.codes


@dataclass(frozen=True)
class KtMethod:
    """How kt-kernel takes a method.

    Attributes:
        classes: of its extension, best first; which exist depends on the variant.
        config: fields of `quant_config`.
        codes, scales: arrays whose addresses it takes, of each expert.
        quantizes: it takes all experts of a projection as bf16, and quantizes them itself.
    """

    classes: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    codes: Callable[[Codes], Array] = _plain
    scales: Scales = lambda codes: codes.scales
    quantizes: bool = False


def _groups(bits: int, size: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": size, "zero_point": False}


_METHODS: Mapping[str, KtMethod] = MappingProxyType(
    {
        "MXFP4": KtMethod(
            ("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"), _groups(4, 32), scales=_as_bf16_powers
        ),
        "NVFP4": KtMethod(("AVX2MXFP4_MOE",), _groups(4, 16), scales=_folded),
        "BF16": KtMethod(("AMXBF16_MOE", "AVX2BF16_MOE")),
        "FP8": KtMethod(("AMXFP8_MOE", "AVX2FP8_MOE"), _groups(8, 128)),
        "FP8_PERCHANNEL": KtMethod(
            ("AMXFP8PerChannel_MOE",), {"bits": 8, "per_channel": True, "zero_point": False}
        ),
        "MXFP8": KtMethod(("AVX2MXFP8_MOE",), _groups(8, 32)),
        "RAWINT4": KtMethod(("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), _groups(4, 32)),
        "GPTQ_INT4": KtMethod(
            ("AVX2GPTQInt4_MOE",), _groups(4, 128), codes=_gptq_codes, scales=_transposed
        ),
        "AMXINT8": KtMethod(("AMXInt8_MOE",), quantizes=True),
        "AMXINT4": KtMethod(("AMXInt4_MOE",), quantizes=True),
    }
)


class KtKernel(Peer):
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        kt_kernel: Any = importlib.import_module("kt_kernel")
        kt_kernel_ext: Any = kt_kernel.kt_kernel_ext
        moe = kt_kernel_ext.moe
        how = _METHODS.get(method)
        names = [name for name in how.classes if hasattr(moe, name)] if how else []
        if how is None or not names:
            raise UnavailableError(f"kt-kernel ({kt_kernel.__cpu_variant__}) has no {method} here")
        self._class_name, self._shape, self._how = names[0], shape, how
        torch.set_num_threads(threads)
        workers = kt_kernel_ext.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map = 1, [0]
        workers.subpool_thread_count = [threads]
        self._infer = kt_kernel_ext.CPUInfer(workers)
        config = moe.MOEConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate, 0)
        config.layer_idx, config.pool = 0, self._infer.backend_
        config.max_len = -(-max_tokens // _TOKENS) * _TOKENS
        for name, value in how.config.items():
            setattr(config.quant_config, name, value)
        sources = random_experts(shape, method)
        kept = self._give_all(config, sources) if how.quantizes else self._point_at(config, sources)
        try:
            self._moe = getattr(moe, self._class_name)(config)
        except (RuntimeError, ValueError) as error:  # sizes that it does not take
            raise UnavailableError(f"kt-kernel's {self._class_name}: {error}") from error
        identity = torch.arange(shape.experts)
        self._infer.submit(self._moe.load_weights_task(identity.data_ptr()))
        self._infer.sync()
        del sources
        self._kept = kept if self._class_name.startswith("AVX2") else []  # the others have copied

    def _point_at(self, config: Any, sources: list[dict[str, Codes]]) -> list[Array]:
        kept: list[Array] = []

        def address(array: Array | None) -> int:
            if array is None:
                return 0
            kept.append(np.ascontiguousarray(array))
            return int(kept[-1].ctypes.data)

        for name in self._shape.matrices:
            codes = [address(self._how.codes(s[name])) for s in sources]
            scales = [address(self._how.scales(s[name])) for s in sources]
            experts = range(self._shape.experts)
            setattr(config, f"{name}_projs", [[codes[e % SOURCES] for e in experts]])
            setattr(config, f"{name}_scales", [[scales[e % SOURCES] for e in experts]])
        return kept

    def _give_all(self, config: Any, sources: list[dict[str, Codes]]) -> list[Array]:
        """One bf16 array [experts, N, K] for each projection."""
        kept: list[Array] = []
        for name, size in self._shape.matrices.items():
            values = [bf16_bits(s[name].dequantize().astype(np.float32)) for s in sources]
            whole = np.empty((self._shape.experts, *size), np.uint16)
            for e in range(self._shape.experts):
                whole[e] = values[e % SOURCES]
            setattr(config, f"{name}_proj", int(whole.ctypes.data))
            kept.append(whole)
        config.gate_scale = 0
        return kept

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
