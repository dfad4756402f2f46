"""Rewrite a checkpoint with its routed experts in another format; the rest is copied unchanged.

One expert per thread is in memory at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.table import format_named, method_named
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat, layer_formats
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.companions import companion_files
from hybrid_moe.loaders.expert_source import ExpertSource, held_formats
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.layout import gate_up_layout as layout_named
from hybrid_moe.loaders.model_config import CONFIG_NAME
from hybrid_moe.loaders.naming import FUSED, GPT_OSS_MXFP4, PER_EXPERT, NamingScheme
from hybrid_moe.loaders.safetensors import ReadBuffers
from hybrid_moe.loaders.writer import PlannedTensor, ShardedWriter
from hybrid_moe.parallel import for_each

SHARD_BYTES = 5_000_000_000
CONFIG_KEY = "hybrid_moe"
"""Key in `config.json` that says what `convert_checkpoint` did; other tools ignore it."""

_COPY_BYTES = 16 << 20
_INT8_DTYPES = ("I8", "F16")
Progress = Callable[[int, int], None]


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    method: str = "MXFP4",
    progress: bool | Progress = True,
    *,
    threads: int = 1,
    shard_bytes: int = SHARD_BYTES,
    gate_up_layout: str | None = None,
) -> None:
    """Write a checkpoint whose routed experts are quantized.

    Experts keep the names of their family; fused ones are written one by one under the names of
    Qwen3-MoE, those whose gate and up alternate as the `*_blocks` and `*_scales` of gpt-oss's MXFP4
    release. Every other tensor and file is copied, and so are layers whose experts are in that
    format already, and draft layers. `config.json` gets the entry `"hybrid_moe": {"experts":
    method, "group": 32}`.

    Args:
        src: directory of a checkpoint whose experts are BF16, F16 or F32.
        dst: directory to write; created, or empty.
        method: "MXFP4" or "INT8". INT8 has the same names, codes as I8 and scales as F16.
        progress: True shows a bar on stderr; a function is called with (bytes done, bytes in all).
        threads: threads that quantize.
        shard_bytes: largest size of a shard.
        gate_up_layout: "halves" or "interleaved": where gate and up lie in fused tensors, for a
            model that Transformers does not know.

    Raises:
        ValueError: unknown method or layout, `dst` is not empty or is `src`, or there is nothing
            to convert (all experts are quantized already).
        CheckpointError: the source is damaged or has no experts, a weight is not finite, or
            nothing tells where gate and up lie.
        OSError: too little room at `dst`.
    """
    fmt = format_named(method)
    if fmt.scale is None:
        raise ValueError(f'experts are converted to method="MXFP4" or "INT8", not to {fmt.name}')
    source_path, target_path = Path(src), Path(dst)
    _check_paths(source_path, target_path)
    checkpoint = Checkpoint.open(source_path)
    layout = layout_named(gate_up_layout)
    stored = [_of_safetensors(source) for source in checkpoint.sources().values()]
    stored = [source.with_layout(layout) for source in stored]
    layers = [layer for layer in stored if layer.formats != layer_formats(fmt)]
    if not layers:
        raise ValueError(
            f"the experts of {source_path} are {fmt.name} already; there is nothing to convert"
        )
    for layer in layers:
        held_formats(layer, method_named(method))
        layer.check_layout()
    companions = companion_files(source_path)
    copied = _unchanged(checkpoint, layers)
    planned = [PlannedTensor(tensor.key, tensor.dtype, tensor.shape) for tensor in copied]
    for layer in layers:
        planned += _plan_layer(layer, fmt)
    target_path.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in planned)
    free = shutil.disk_usage(target_path).free
    if free < total:
        raise OSError(f"{target_path}: {total} bytes will be written, {free} are free")
    with _Meter(total, progress) as meter:
        writer = ShardedWriter(target_path, planned, shard_bytes)
        try:
            _convert_tensors(checkpoint, copied, layers, fmt, writer, meter, threads)
            _add_files(companions, writer, checkpoint, fmt)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        finally:
            checkpoint.close()


def _of_safetensors(source: ExpertSource) -> LayerSource:
    """The same source. Raises `ValueError` for a GGUF model."""
    if not isinstance(source, LayerSource):
        raise ValueError(
            f"{source.path} is a GGUF model, of which convert has no use: it is loaded as it is "
            "(see inspect), and converted from the checkpoint that it was made from"
        )
    return source


def _convert_tensors(
    checkpoint: Checkpoint,
    copied: list[TensorInfo],
    layers: list[LayerSource],
    fmt: WeightFormat,
    writer: ShardedWriter,
    meter: _Meter,
    threads: int,
) -> None:
    buffers = ReadBuffers()

    def work(item: TensorInfo | tuple[LayerSource, int]) -> None:
        if isinstance(item, tuple):
            layer, expert = item
            tensors = layer.expert(expert, fmt, buffers.mine)
            for key, data, at in _expert_pieces(layer, expert, tensors):
                writer.write(key, data, at)
                meter.add(data.nbytes)
        else:
            _copy_tensor(checkpoint, item, writer, meter)

    items: list[TensorInfo | tuple[LayerSource, int]] = [*copied]
    items += [(layer, expert) for layer in layers for expert in range(layer.num_experts)]
    for_each(items, work, threads)


def _copy_tensor(
    checkpoint: Checkpoint, tensor: TensorInfo, writer: ShardedWriter, meter: _Meter
) -> None:
    rows = tensor.shape[0] if tensor.shape else 1
    if not rows or tensor.nbytes <= _COPY_BYTES:
        writer.write(tensor.key, checkpoint.index.read(tensor.key))
        meter.add(tensor.nbytes)
        return
    step = max(1, _COPY_BYTES * rows // tensor.nbytes)
    for start in range(0, rows, step):
        data = checkpoint.index.read(tensor.key, slice(start, start + step))
        writer.write(tensor.key, data, start * (tensor.nbytes // rows))
        meter.add(data.nbytes)


def _unchanged(checkpoint: Checkpoint, layers: list[LayerSource]) -> list[TensorInfo]:
    """Tensors that are copied: all but those written anew, in the order of their shards."""
    replaced = {
        tensor.key
        for layer in layers
        for stacks in layer.stacks
        for stack in stacks
        for tensor in (stack.tensors if _splits_biases(layer) else (stack.weight,))
    }
    return [tensor for key, tensor in checkpoint.index.tensors.items() if key not in replaced]


def _written(layer: LayerSource) -> NamingScheme:
    """The scheme in which a layer's experts are written: one whose name leaves no layout open."""
    if layer.scheme is not FUSED:
        return layer.scheme
    return GPT_OSS_MXFP4 if layer.interleaved else PER_EXPERT


def _splits_biases(layer: LayerSource) -> bool:
    """Whether biases of all experts become one for each, as their weights do."""
    return layer.has_bias and layer.scheme.fused and not _written(layer).fused


def _written_keys(layer: LayerSource, expert: int, projection: str) -> tuple[str, str, str]:
    """The keys under which codes, scales and bias are written."""
    scheme = _written(layer)
    stem = scheme.stem(layer.prefix, layer.layer, expert) + projection
    return stem + scheme.weights[0], stem + scheme.scales[0], stem + scheme.bias


def _plan_layer(layer: LayerSource, fmt: WeightFormat) -> list[PlannedTensor]:
    scheme = _written(layer)
    code_dtype, scale_dtype = scheme.mxfp4_dtypes if fmt is MXFP4 else _INT8_DTYPES
    H, I = layer.hidden, layer.intermediate
    planned: list[PlannedTensor] = []
    projections = [(scheme.gate, I, H), (scheme.up, I, H), (scheme.down, H, I)]
    if scheme.fused:
        projections = [(scheme.gate, 2 * I, H), (scheme.down, H, I)]
    for expert in range(1 if scheme.fused else layer.num_experts):
        for projection, N, K in projections:
            code_key, scale_key, bias_key = _written_keys(layer, expert, projection)
            codes, scales = fmt.code_shape(N, K), (N, K // fmt.group)
            if scheme.fused:  # gpt-oss: [E, N, K/32, 16] (INT8: 32) and [E, N, K/32]
                blocks = (layer.num_experts, *scales, codes[1] // scales[1])
                planned.append(PlannedTensor(code_key, code_dtype, blocks))
                planned.append(PlannedTensor(scale_key, scale_dtype, blocks[:-1]))
            else:
                planned.append(PlannedTensor(code_key, code_dtype, codes))
                planned.append(PlannedTensor(scale_key, scale_dtype, scales))
                if _splits_biases(layer):
                    planned.append(PlannedTensor(bias_key, "F32", (N,)))
    return planned


def _expert_pieces(
    layer: LayerSource, expert: int, tensors: ExpertTensors
) -> list[tuple[str, Array, int]]:
    """What is written for one expert: key, values, and where in the tensor they begin (bytes)."""
    scheme = _written(layer)
    pieces: list[tuple[str, Array, int]] = []
    matrices = [(scheme.gate, tensors.gate), (scheme.up, tensors.up), (scheme.down, tensors.down)]
    if scheme.fused:
        gate_up = _interleave(tensors.gate, tensors.up)
        matrices = [(scheme.gate, gate_up), (scheme.down, tensors.down)]
    for projection, matrix in matrices:
        assert matrix.scales is not None  # the format has scales
        code_key, scale_key, bias_key = _written_keys(layer, expert, projection)
        if _splits_biases(layer):
            assert matrix.bias is not None
            pieces.append((bias_key, np.ascontiguousarray(matrix.bias), 0))
        for key, data in ((code_key, matrix.codes), (scale_key, matrix.scales)):
            pieces.append((key, data, expert * data.nbytes if scheme.fused else 0))
    return pieces


def _interleave(gate: Matrix, up: Matrix) -> Matrix:
    """Rows of gate and up in turn, as gpt-oss stores them."""
    assert gate.scales is not None and up.scales is not None
    codes = np.stack([gate.codes, up.codes], axis=1).reshape(-1, gate.codes.shape[1])
    scales = np.stack([gate.scales, up.scales], axis=1).reshape(-1, gate.scales.shape[1])
    return Matrix(codes, scales)


def _check_paths(src: Path, dst: Path) -> None:
    if not src.exists():
        raise FileNotFoundError(f"no checkpoint at {src}: the path does not exist")
    if not src.is_dir():
        raise NotADirectoryError(f"{src}: a checkpoint's directory is needed")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst} is a file; a directory to write to is needed")
    if dst.resolve().is_relative_to(src.resolve()):
        raise ValueError(
            f"{dst} is (or lies in) the checkpoint that is to be converted; name another directory"
        )
    if dst.is_dir() and any(dst.iterdir()):
        raise ValueError(f"{dst} is not empty; name a new or an empty directory")


def _add_files(
    companions: dict[str, Path], writer: ShardedWriter, checkpoint: Checkpoint, fmt: WeightFormat
) -> None:
    """Copy configuration and tokenizer. `config.json` is added last: with it, all is there."""
    for name, file in companions.items():
        if name != CONFIG_NAME:
            writer.add_file(name, file)
    if checkpoint.config:
        config = {**checkpoint.config, CONFIG_KEY: {"experts": fmt.name, "group": fmt.group}}
        config.pop("transformers_weights", None)  # the weights have the usual names now
        writer.add_file(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


class _Meter:
    """Counts bytes from any thread, and shows them as a bar or passes them on."""

    def __init__(self, total: int, progress: bool | Progress) -> None:
        self._total, self._done, self._lock = total, 0, threading.Lock()
        self._call = progress if callable(progress) else None
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, disable=None if progress is True else True
        )

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        with self._lock:
            self._done += nbytes
            self._bar.update(nbytes)
            if self._call is not None:
                self._call(self._done, self._total)
