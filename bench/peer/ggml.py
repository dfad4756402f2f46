"""ggml's expert FFN, as llama.cpp builds it, through the C interface of its shared libraries.

Weights are quantized from the same values by ggml itself. The directory with `libggml-base.so` and
`libggml-cpu.so` (`make bench-peers-install` builds them) is in `GGML_LIB`.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from problem import SOURCES, Array, Batch, Shape, bf16_values
from weights import Codes, random_experts

from peer.interface import Peer, UnavailableError

_F32, _I32 = 0, 26
_INT4 = ("RAWINT4", "GPTQ_INT4", "AWQ", "AMXINT4")
_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39,
}  # fmt: skip
"""ggml_type; these numbers are part of the GGUF file format."""
_NEAREST = {"INT8": "Q8_0", "AMXINT8": "Q8_0", **dict.fromkeys(_INT4, "Q4_0")}
"""Type beside methods that ggml does not have: as many bits of a weight, with a scale for 32."""

_GRAPH_NODES = 256
_QUANTIZED_ROWS = 256


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    """The beginning of `ggml_type_traits`."""

    _fields_ = (
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64),
        ("type_size", c_size_t), ("is_quantized", c_bool), ("to_float", c_void_p),
    )  # fmt: skip


P, S = c_void_p, c_size_t
_BASE = {
    "ggml_init": (P, [_InitParams]),
    "ggml_free": (None, [P]),
    "ggml_tensor_overhead": (S, []),
    "ggml_graph_overhead_custom": (S, [S, c_bool]),
    "ggml_new_tensor_2d": (P, [P, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (P, [P, c_int, c_int64, c_int64, c_int64]),
    "ggml_nbytes": (S, [P]),
    "ggml_row_size": (S, [c_int, c_int64]),
    "ggml_get_data": (P, [P]),
    "ggml_set_input": (None, [P]),
    "ggml_set_output": (None, [P]),
    "ggml_mul_mat_id": (P, [P, P, P, P]),
    "ggml_swiglu_split": (P, [P, P, P]),
    "ggml_mul": (P, [P, P, P]),
    "ggml_add": (P, [P, P, P]),
    "ggml_view_2d": (P, [P, P, c_int64, c_int64, S, S]),
    "ggml_new_graph_custom": (P, [P, S, c_bool]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_quantize_chunk": (S, [c_int, P, P, c_int64, c_int64, c_int64, P]),
    "ggml_gallocr_new": (P, [P]),
    "ggml_gallocr_alloc_graph": (c_bool, [P, P]),
    "ggml_gallocr_free": (None, [P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_tensor_set": (None, [P, P, S, S]),
    "ggml_backend_graph_compute": (c_int, [P, P]),
    "ggml_backend_supports_op": (c_bool, [P, P]),
    "ggml_backend_get_device": (P, [P]),
    "ggml_backend_dev_backend_reg": (P, [P]),
    "ggml_backend_reg_get_proc_address": (P, [P, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [P]),
    "ggml_version": (c_char_p, []),
    "ggml_get_type_traits": (P, [c_int]),
}
_CPU = {
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, c_int]),
    "ggml_backend_cpu_buffer_type": (P, []),
}


class _Library:
    """The functions above as attributes."""

    def __init__(self, directory: Path) -> None:
        for file, table in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            if not (directory / file).exists():
                raise UnavailableError(f"GGML_LIB={directory} has no {file}")
            library = ctypes.CDLL(str(directory / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in table.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not in the tables of this module")

    def context(self, tensors: int, graph: bool = False) -> int:
        """A context that describes tensors and holds no data."""
        size = tensors * self.tensor_overhead()
        if graph:
            size += self.graph_overhead_custom(_GRAPH_NODES, False)
        return int(self.init(_InitParams(size, None, True)))


def quantized_by_ggml(directory: str, type_name: str, values: Array) -> Array | None:
    """float32 [N, K], quantized and back by the libraries of that directory; None where they have
    no such type."""
    if type_name not in _TYPES:
        return None
    g, kind = _Library(Path(directory)), _TYPES[type_name]
    N, K = values.shape
    rows = np.empty(N * g.row_size(kind, K), np.uint8)
    g.quantize_chunk(kind, values.ctypes.data, rows.ctypes.data, 0, N, K, None)
    return _dequantized(g, kind, rows, N, K)


def _dequantized(g: _Library, kind: int, rows: Array, N: int, K: int) -> Array:
    """Through the function of the type's table: (blocks, float32 out, count)."""
    traits = ctypes.cast(g.get_type_traits(kind), ctypes.POINTER(_TypeTraits)).contents
    values = np.empty((N, K), np.float32)
    to_float = ctypes.CFUNCTYPE(None, P, P, c_int64)(traits.to_float)
    to_float(rows.ctypes.data, values.ctypes.data, N * K)
    return values


class Ggml(Peer):
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        self._type_name = _NEAREST.get(method, method)
        if self._type_name not in _TYPES:
            raise UnavailableError(f"no ggml type for {method}")
        directory = os.environ.get("GGML_LIB")
        if not directory:
            raise UnavailableError("GGML_LIB does not name the directory of ggml's libraries")
        self._g = _Library(Path(directory))
        self._shape, self._type = shape, _TYPES[self._type_name]
        self._backend = self._g.backend_cpu_init()
        self._g.backend_cpu_set_n_threads(self._backend, threads)
        self._graph_context: int | None = None
        self._allocator: int | None = None
        if not self._allocate(repacked=True):
            self._allocate(repacked=False)
        sources = random_experts(shape, method)
        self._rows: dict[str, list[Array]] = {}
        for name, tensor in self._weights.items():
            rows = self._rows[name] = [self._quantize(source[name]) for source in sources]
            data = np.concatenate([rows[e % SOURCES] for e in range(shape.experts)])
            assert data.nbytes == self._g.nbytes(tensor)
            self._g.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def _allocate(self, repacked: bool) -> bool:
        """Allocate the weights; False if their type has no repacked kernels here."""
        buffer_type = self._repack_type() if repacked else self._g.backend_cpu_buffer_type()
        if buffer_type is None:
            return False
        context, E = self._g.context(16), self._shape.experts
        self._weights = {
            name: self._g.new_tensor_3d(context, self._type, K, N, E)
            for name, (N, K) in self._shape.matrices.items()
        }
        buffer = self._g.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        self._graph(tokens=1)
        self._buffer_name = self._g.backend_buft_name(buffer_type).decode()
        supported = [self._g.backend_supports_op(self._backend, p) for p in self._products]
        if repacked and not all(supported):
            self._g.backend_buffer_free(buffer)
            return False
        return True

    def _repack_type(self) -> int | None:
        """Buffer type that rearranges weights, llama.cpp's default where it applies."""
        registry = self._g.backend_dev_backend_reg(self._g.backend_get_device(self._backend))
        address = self._g.backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        types = extra(self._g.backend_get_device(self._backend))
        index = 0
        while types and types[index]:
            if b"REPACK" in self._g.backend_buft_name(types[index]):
                return int(types[index])
            index += 1
        return None

    def _quantize(self, codes: Codes) -> Array:
        """ggml's rows of a matrix. Its quantizers search for seconds a matrix, so what is larger is
        made of the first rows, again and again."""
        if self._type == _TYPES["BF16"]:
            return codes.codes.view(np.uint8).ravel()
        N = len(codes.codes)
        values = codes.rows(min(N, _QUANTIZED_ROWS)).dequantize().astype(np.float32)
        rows, K = values.shape
        out = np.empty(rows * self._g.row_size(self._type, K), np.uint8)
        self._g.quantize_chunk(self._type, values.ctypes.data, out.ctypes.data, 0, rows, K, None)
        return np.resize(out.reshape(rows, -1), (N, out.size // rows)).ravel()

    def _graph(self, tokens: int) -> None:
        """Build the graph of a batch size, as llama.cpp's `build_moe_ffn`."""
        g, H, k = self._g, self._shape.hidden, self._shape.top_k
        if self._graph_context is not None:
            g.free(self._graph_context)
        c = self._graph_context = g.context(_GRAPH_NODES, graph=True)
        self._x = g.new_tensor_3d(c, _F32, H, 1, tokens)
        self._ids = g.new_tensor_2d(c, _I32, k, tokens)
        self._routing = g.new_tensor_3d(c, _F32, 1, k, tokens)
        for tensor in (self._x, self._ids, self._routing):
            g.set_input(tensor)
        up = g.mul_mat_id(c, self._weights["up"], self._x, self._ids)
        gate = g.mul_mat_id(c, self._weights["gate"], self._x, self._ids)
        hidden = g.swiglu_split(c, gate, up)
        down = g.mul_mat_id(c, self._weights["down"], hidden, self._ids)
        self._products = (up, gate, down)
        experts = g.mul(c, down, self._routing)
        y = g.view_2d(c, experts, H, tokens, 4 * H * k, 0)
        for slot in range(1, k):
            y = g.add(c, y, g.view_2d(c, experts, H, tokens, 4 * H * k, 4 * H * slot))
        g.set_output(y)
        self._y, self._tokens = y, tokens
        self._graph_address = g.new_graph_custom(c, _GRAPH_NODES, False)
        g.build_forward_expand(self._graph_address, y)

    @property
    def label(self) -> str:
        version = self._g.version().decode()
        return f"ggml {version} ({self._type_name}, {self._buffer_name})"

    def experts(self) -> list[dict[str, Array]]:
        """What ggml made of the values that it was given."""
        return [
            {
                name: _dequantized(self._g, self._type, rows[i], *self._shape.matrices[name])
                for name, rows in self._rows.items()
            }
            for i in range(SOURCES)
        ]

    def prepare(self, batches: list[Batch]) -> None:
        if self._allocator is not None:
            self._g.gallocr_free(self._allocator)
        self._graph(len(batches[0].x))
        self._allocator = self._g.gallocr_new(self._g.backend_cpu_buffer_type())
        if not self._g.gallocr_alloc_graph(self._allocator, self._graph_address):
            raise MemoryError("ggml could not allocate its graph")
        self._batches = [
            (bf16_values(b.x), b.ids.astype(np.int32), np.ascontiguousarray(b.weights))
            for b in batches
        ]

    def call(self, index: int) -> None:
        x, ids, weights = self._batches[index]
        for tensor, array in ((self._x, x), (self._ids, ids), (self._routing, weights)):
            ctypes.memmove(self._g.get_data(tensor), array.ctypes.data, array.nbytes)
        status = self._g.backend_graph_compute(self._backend, self._graph_address)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> Array:
        shape = (self._tokens, self._shape.hidden)
        out = np.empty(shape, np.float32)
        ctypes.memmove(out.ctypes.data, self._g.get_data(self._y), out.nbytes)
        return out
