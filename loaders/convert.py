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
from typing import Any

from tqdm import tqdm

from hybrid_moe.formats.table import method_named
from hybrid_moe.formats.weight_format import WeightFormat, layer_formats
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.companions import companion_files
from hybrid_moe.loaders.expert_source import ExpertSource, held_formats
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.layout import gate_up_layout as layout_named
from hybrid_moe.loaders.model_config import CONFIG_NAME
from hybrid_moe.loaders.safetensors import ReadBuffers
from hybrid_moe.loaders.writer import PlannedTensor, ShardedWriter
from hybrid_moe.loaders.written import (
    expert_pieces,
    planned_tensors,
    splits_biases,
    written_format,
    written_scheme,
)
from hybrid_moe.loaders.written_config import KEY as QUANTIZATION_KEY
from hybrid_moe.loaders.written_config import quantization_config
from hybrid_moe.parallel import for_each

SHARD_BYTES = 5_000_000_000
CONFIG_KEY = "hybrid_moe"
"""Key in `config.json` that says what `convert_checkpoint` did; other tools ignore it."""

_COPY_BYTES = 16 << 20
_FLOATS = ("BF16", "F16", "F32", "F64", "I64")
"""Dtypes of tensors that no configuration has to explain; I64: tables of ids."""
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
    group_size: int | None = None,
) -> None:
    """Write a checkpoint whose routed experts are quantized.

    Experts keep the names of their family; fused ones are written one by one under the names of
    Qwen3-MoE, but as the `*_blocks` and `*_scales` of gpt-oss's MXFP4 release where gate and up
    alternate and the method is MXFP4 or INT8. Which tensors a format has is in `written`. Every
    other tensor and file is copied, and so are layers whose experts are in that format already, and
    draft layers. `config.json` gets the entry `"hybrid_moe": {"experts": format, "group": inputs
    of a scale}` and, where it has none, the `quantization_config` by which other libraries read it.

    Args:
        src: directory of a checkpoint whose experts are BF16, F16 or F32; or FP8, which becomes
            AMXINT4 and AMXINT8 too.
        dst: directory to write; created, or empty.
        method: MXFP4, FP8, FP8_PERCHANNEL, MXFP8, RAWINT4, AMXINT4, AMXINT8, MOE_INT4, MOE_INT8 or
            INT8.
        progress: True shows a bar on stderr; a function is called with (bytes done, bytes in all).
        threads: threads that quantize.
        shard_bytes: largest size of a shard.
        gate_up_layout: "halves" or "interleaved": where gate and up lie in fused tensors, for a
            model that Transformers does not know.
        group_size: inputs that share a scale; of RAWINT4 32 (as Kimi-K2), 64 or 128.

    Raises:
        ValueError: unknown method, layout or group, `dst` is not empty or is `src`, the source is
            GGUF, or there is nothing to convert (all experts are quantized already).
        CheckpointError: the source is damaged or has no experts, a weight is not finite, or
            nothing tells where gate and up lie.
        OSError: too little room at `dst`.
    """
    fmt = written_format(method, group_size)
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
        held = held_formats(layer, method_named(method))
        if held == layer.formats:
            raise ValueError(
                f"layer {layer.layer} of {source_path} stores its experts as {held.name}, which "
                f"does not become {fmt.name}"
            )
        for K in (layer.hidden, layer.intermediate):
            if K % fmt.k_multiple:
                raise ValueError(
                    f"layer {layer.layer} of {source_path} has rows of {K} weights; of {fmt.name} "
                    f"their length must be a multiple of {fmt.k_multiple}"
                )
        layer.check_layout()
    companions = companion_files(source_path)
    copied = _unchanged(checkpoint, layers, fmt)
    planned = [PlannedTensor(tensor.key, tensor.dtype, tensor.shape) for tensor in copied]
    for layer in layers:
        planned += planned_tensors(layer, fmt)
    target_path.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in planned)
    free = shutil.disk_usage(target_path).free
    if free < total:
        raise OSError(f"{target_path}: {total} bytes will be written, {free} are free")
    with _Meter(total, progress) as meter:
        writer = ShardedWriter(target_path, planned, shard_bytes)
        try:
            _convert_tensors(checkpoint, copied, layers, fmt, writer, meter, threads)
            config = _config(checkpoint, layers, fmt, copied)
            _add_files(companions, writer, config)
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
            for key, data, at in expert_pieces(layer, fmt, expert, tensors):
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


def _unchanged(
    checkpoint: Checkpoint, layers: list[LayerSource], fmt: WeightFormat
) -> list[TensorInfo]:
    """Tensors that are copied: all but those written anew, in the order of their shards."""
    replaced = {
        tensor.key
        for layer in layers
        for stacks in layer.stacks
        for stack in stacks
        for tensor in stack.tensors
        if tensor is not stack.bias or splits_biases(layer, fmt)
    }
    replaced.update(key for layer in layers for key in layer.unused)
    return [tensor for key, tensor in checkpoint.index.tensors.items() if key not in replaced]


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


def _config(
    checkpoint: Checkpoint, layers: list[LayerSource], fmt: WeightFormat, kept: list[TensorInfo]
) -> dict[str, Any] | None:
    """What `config.json` becomes; None where there was none. A `quantization_config` that is there
    stays where the rest of the model needs it."""
    if not checkpoint.config:
        return None
    config = {**checkpoint.config, CONFIG_KEY: {"experts": fmt.name, "group": fmt.group}}
    config.pop("transformers_weights", None)  # the weights have the usual names now
    schemes = [written_scheme(layer, fmt) for layer in layers]
    if QUANTIZATION_KEY not in config or all(tensor.dtype in _FLOATS for tensor in kept):
        config.pop(QUANTIZATION_KEY, None)
        said = quantization_config(fmt, schemes, kept)
        config |= {} if said is None else {QUANTIZATION_KEY: said}
    return config


def _add_files(
    companions: dict[str, Path], writer: ShardedWriter, config: dict[str, Any] | None
) -> None:
    """Copy configuration and tokenizer. `config.json` is added last: with it, all is there."""
    for name, file in companions.items():
        if name != CONFIG_NAME:
            writer.add_file(name, file)
    if config is not None:
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
