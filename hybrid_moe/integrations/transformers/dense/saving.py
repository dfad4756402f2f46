"""`save_pretrained` of a model with packed weights: a checkpoint with all of them, from the strips.

Keys and shapes are Transformers' own: its conversion, which renames and splits what a model holds,
runs on stand-ins, and which tensor became which is read off the results. What it only renames is
written a few rows, or one expert, at a time. What it computes with, apart from experts, is unpacked
for it, one decoder layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.grouped import HybridGroupedLinear
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import HybridMLP
from hybrid_moe.integrations.transformers.dense.saved_experts import (
    SavedExperts,
    planned,
    stand_ins,
)
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight, values
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.loaders.files import INDEX_NAME
from hybrid_moe.loaders.writer import PlannedTensor, ShardedWriter

PART_BYTES = 4 << 20
"""Of a tensor that are unpacked and written at a time."""

DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
"""What safetensors calls torch's dtypes."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that the model holds.

    Attributes:
        shape, dtype: as torch would hold it.
        pieces: gives its values, one piece behind the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Array]]

    def tensor(self) -> torch.Tensor:
        """All of it."""
        data = np.concatenate([_bytes_of(piece) for piece in self.pieces()])
        return torch.from_numpy(data).view(self.dtype).reshape(self.shape)


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    """Transformers' `save_pretrained` for a model whose weights are packed. Weights, those of
    experts too, are written in the format that they are held in, so that the result loads here, and
    in plain Transformers where it knows the format (BF16; MXFP4 of gpt-oss).

    Args:
        self: the model.
        save_directory: made if need be; a checkpoint that is there is replaced.
        is_main_process: False writes nothing.
        state_dict: given, Transformers saves that, and nothing that is packed.
        push_to_hub, variant: refused.
        max_shard_size: of a file, in bytes or as "5GB".
        save_original_format: with the keys of the hub rather than of the modules.
        **kwargs: what Transformers takes for adapters and the hub.

    Raises:
        NotImplementedError: weights in a format that no checkpoint stores so (dense layers other
            than BF16), an option that is refused. Nothing has been written then.
    """
    if state_dict is not None or getattr(self, "_hf_peft_config_loaded", False):
        type(self).save_pretrained(self, save_directory, state_dict=state_dict, **kwargs)
        return
    options = {"push_to_hub": push_to_hub, "variant": variant}
    options["distributed_checkpoint"] = kwargs.get("distributed_checkpoint")
    for name, given in options.items():
        if given:
            raise NotImplementedError(
                f"{name}={given!r} for a model with packed weights: save it without, to a folder"
            )
    if getattr(self.config, "quantization_config", None) is not None:
        raise NotImplementedError("a model whose other weights Transformers has quantised")
    plan = SavePlan(self, save_original_format)
    shard_bytes = _nbytes(max_shard_size)
    if not is_main_process:
        return
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    writer = ShardedWriter(directory, plan.tensors, shard_bytes)
    try:
        total = sum(tensor.nbytes for tensor in plan.tensors)
        with tqdm(desc="Writing weights", total=total, unit="B", unit_scale=True) as bar:
            for key, data, at in plan.writes():
                writer.write(key, data, at)
                bar.update(data.nbytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    for file in directory.iterdir():  # of a checkpoint that was there
        sharded = file.name == INDEX_NAME and len(writer.shards) == 1
        if sharded or (_WEIGHTS.fullmatch(file.name) and file.name not in writer.shards):
            file.unlink()
    _save_config(self, directory, plan)


class SavePlan:
    """What is written for a model, and from where.

    Attributes:
        tensors: everything, in the order of its keys.
        experts: the experts among it.
    """

    def __init__(self, model: Any, original_format: bool) -> None:
        """Find it; nothing is unpacked yet.

        Raises:
            NotImplementedError: weights in a format that is not written.
        """
        from transformers.core_model_loading import revert_weight_conversion

        self._model, self._revert = model, revert_weight_conversion
        modules = {n: m for n, m in model.named_modules() if isinstance(m, HybridExperts)}
        self._sources = sources = _sources(model)
        given = stand_ins(modules)
        held = {name: _like(source) for name, source in sources.items()}
        converted = {**held, **given}
        if original_format:
            converted = revert_weight_conversion(model, dict(converted))
        names = {id(tensor): name for name, tensor in held.items()}
        of_experts = {
            k: t for k, t in converted.items() if t.dtype == torch.float64 and not t.is_meta
        }
        dtype = DTYPES[model.dtype]
        self.experts = [
            SavedExperts(name, module, given, of_experts, dtype) for name, module in modules.items()
        ]
        self._direct = {key: names[id(t)] for key, t in converted.items() if id(t) in names}
        rest = {k: t for k, t in converted.items() if k not in of_experts and k not in self._direct}
        self._computed = set(rest)
        self._consumed = set(sources) - set(self._direct.values())
        whole = [
            PlannedTensor(key, DTYPES[t.dtype], tuple(t.shape))
            for key, t in converted.items()
            if key not in of_experts
        ]
        self.tensors = whole + planned(self.experts)

    def writes(self) -> Iterator[tuple[str, Array, int]]:
        """Key, values, and the byte of the tensor at which they begin."""
        for key, name in self._direct.items():
            at = 0
            for piece in self._sources[name].pieces():
                yield key, piece, at
                at += piece.nbytes
        layers: dict[str, list[str]] = {}
        for name in self._consumed:
            match = re.match(r".*?\.\d+\.", name)
            layers.setdefault(match[0] if match else "", []).append(name)
        for these in layers.values():
            tensors = {name: self._sources[name].tensor() for name in these}
            for key, tensor in self._revert(self._model, tensors).items():
                assert key in self._computed
                yield key, _raw(tensor), 0
        for saved in self.experts:
            yield from saved.writes()


def _like(source: HeldTensor) -> torch.Tensor:
    return torch.empty(source.shape, dtype=source.dtype, device="meta")


def _sources(model: Any) -> dict[str, HeldTensor]:
    """What the model holds but for routed experts, by the names that Transformers' modules would
    have for it."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    packed: dict[str, HeldTensor] = {}
    hidden: list[str] = []  # prefixes of packed modules, whose own names are not written
    for name, module in model.named_modules():
        if isinstance(module, HybridMLP):
            packed |= _mlp_sources(name, module)
        elif isinstance(module, HybridGroupedLinear):
            matrices = [b.matrix for b in module.blocks if isinstance(b, HybridLinear)]
            packed[f"{name}.weight"] = _matrix_source(name, matrices)
            hidden.append(f"{name}.")
        elif isinstance(module, HybridLinear) and not any(map(name.startswith, hidden)):
            packed[f"{name}.weight"] = _matrix_source(name, [module.matrix])
    held, plain, tied = model.state_dict(), {}, {}
    for name, tensor in held.items():
        if any(map(name.startswith, hidden)):
            continue
        if not isinstance(tensor, PackedWeight):
            plain[name] = tensor
        elif tensor.dim() == 1:  # a bias
            plain[name] = values(tensor)
        elif name not in packed:  # a tied embedding; it stands for its output layer too
            tied[id(tensor.held)] = name
    for name, tensor in held.items():
        if name in packed and isinstance(tensor, PackedWeight) and id(tensor.held) in tied:
            packed[tied[id(tensor.held)]] = packed.pop(name)
    for name in model._keys_to_ignore_on_save or ():
        plain.pop(name, None)
    plain = remove_tied_weights_from_state_dict(plain, model)
    return packed | {name: _tensor_source(tensor) for name, tensor in plain.items()}


def _matrix_source(name: str, matrices: list[PackedMatrix]) -> HeldTensor:
    """Matrices below each other."""
    first = matrices[0]
    _check_format(name, first.fmt)

    def pieces() -> Iterator[Array]:
        step = max(1, PART_BYTES // (2 * first.inputs))
        for matrix in matrices:
            for start in range(0, matrix.rows, step):
                rows = np.arange(start, min(start + step, matrix.rows), dtype=np.int64)
                yield matrix.take_rows(rows).codes

    return HeldTensor((sum(m.rows for m in matrices), first.inputs), torch.bfloat16, pieces)


def _mlp_sources(name: str, module: HybridMLP) -> dict[str, HeldTensor]:
    _check_format(name, module.layer.fmt)
    H, I = module.spec.hidden, module.spec.intermediate
    sources: dict[str, HeldTensor] = {}

    def matrix(role: str, bias: bool) -> Iterator[Array]:
        tensors: ExpertTensors = module.layer.unpack(0)
        held = getattr(tensors, role)
        yield _raw(torch.from_numpy(held.bias).to(module.dtype)) if bias else held.codes

    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    for role, child, biased in zip(shapes, module.names, module.biased, strict=True):
        shape = shapes[role]
        sources[f"{name}.{child}.weight"] = HeldTensor(
            shape, torch.bfloat16, partial(matrix, role, False)
        )
        if biased:
            sources[f"{name}.{child}.bias"] = HeldTensor(
                shape[:1], module.dtype, partial(matrix, role, True)
            )
    return sources


def _tensor_source(tensor: torch.Tensor) -> HeldTensor:
    return HeldTensor(tuple(tensor.shape), tensor.dtype, lambda: iter([_raw(tensor)]))


def _check_format(name: str, fmt: WeightFormat) -> None:
    if fmt is not BF16:
        raise NotImplementedError(
            f"{name}: dense layers in {fmt.name} are not written: no checkpoint stores them so. "
            'Load the model with dense="bf16" to save it'
        )


def _raw(tensor: torch.Tensor) -> Array:
    """A tensor's bytes; a copy where it is not contiguous or not on the CPU."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Array = data.view(torch.uint8).numpy()
    return raw


def _bytes_of(piece: Array) -> Array:
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8)


def _nbytes(size: int | str) -> int:
    """A size in bytes, or with a unit as Transformers takes it."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]B)\s*", size, re.IGNORECASE)
    if match is None:
        raise ValueError(f"max_shard_size is {size!r}: a number of bytes, or such as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]


def _save_config(model: Any, directory: Path, plan: SavePlan) -> None:
    """The configuration, after the weights: with it, all is there."""
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)
    published = bool(plan.experts) and all(saved.interleaved_mxfp4 for saved in plan.experts)
    if published:
        skipped = [key.removesuffix(".weight") for key in plan._direct if key.endswith(".weight")]
        config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    try:
        config.save_pretrained(directory)
    finally:
        if published:
            del config.quantization_config
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
