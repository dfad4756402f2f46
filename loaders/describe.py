"""What the headers say of one layer's experts, checked in full before anything is read."""

from __future__ import annotations

import re
from collections.abc import Callable

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layer_source import LayerSource, Stack, StoredPair
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.naming import LayerKeys, NamingScheme
from hybrid_moe.loaders.safetensors import SafetensorsIndex
from hybrid_moe.loaders.stored import STORED, Stored, describe_dtypes, known_dtypes, stored_as

_BIAS_DTYPES = ("BF16", "F32", "F16")

_UNUSED = re.compile(r"[._](input_(global_)?scale|weight_shape)$")
"""Tensors beside an expert's weights that do not change what they mean: scales for activations that
are quantized elsewhere and not here, and the shape that codes are packed from."""


def describe_layer(
    index: SafetensorsIndex, keys: LayerKeys, ask_model: Callable[[], GateUp | None]
) -> LayerSource:
    """Find and check all tensors of a layer's experts.

    Args:
        ask_model: the layout of gate and up in the model's own module; asked only when needed.

    Raises:
        CheckpointError: an expert or a tensor is missing, a shape or dtype is wrong, or there is
            a tensor that nothing explains; the message names the tensor and its file.
    """
    scheme = keys.scheme
    experts = _expert_ids(keys, index)
    projections = tuple(dict.fromkeys((scheme.gate, scheme.up, scheme.down)))
    stacks = tuple(
        tuple(_find(index, keys, expert, projection) for projection in projections)
        for expert in experts
    )
    first, down = stacks[0][0], stacks[0][-1]
    stored = _stored(first, scheme)
    num_experts = _expert_shape(first.weight, scheme)[0] if scheme.fused else len(experts)
    if num_experts == 0:
        raise CheckpointError(f"{first.weight.where}: shape {first.weight.shape} has no experts")
    hidden, intermediate, transposed = _sizes(first.weight, down.weight, scheme, stored)
    source = LayerSource(
        index=index,
        layer=keys.layer,
        prefix=keys.prefix,
        scheme=scheme,
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
        stored=StoredPair(stored, stored),
        transposed=transposed,
        stacks=stacks,
        unused=_unused(index, keys, stacks),
        ask_model=ask_model,
    )
    for K in (hidden, intermediate):
        if K == 0 or K % stored.format.k_multiple:
            raise CheckpointError(
                f"{first.weight.where}: {stored.format.name} rows of {K} weights; "
                f"the length must be a multiple of {stored.format.k_multiple}"
            )
    for expert_stacks in stacks:
        for stack in expert_stacks:
            _check_stack(stack, source, is_down=stack is expert_stacks[-1])
    return source


def _unused(
    index: SafetensorsIndex, keys: LayerKeys, stacks: tuple[tuple[Stack, ...], ...]
) -> tuple[str, ...]:
    """Keys of the layer's experts that are not read, all of them harmless."""
    read = {t.key for expert_stacks in stacks for stack in expert_stacks for t in stack.tensors}
    unused = [key for key in (*keys.keys, *keys.foreign) if key not in read]
    for key in unused:
        if not _UNUSED.search(key):
            raise CheckpointError(
                f"{index.tensors[key].where}: an expert's tensor that {keys.scheme.name} experts "
                "do not have: what it means for them is not known"
            )
    return tuple(unused)


def _expert_ids(keys: LayerKeys, index: SafetensorsIndex) -> range:
    if keys.scheme.fused:
        return range(1)
    count = max(keys.experts) + 1
    if len(keys.experts) != count:
        missing = next(expert for expert in range(count) if expert not in keys.experts)
        stem = keys.scheme.stem(keys.prefix, keys.layer, missing)
        raise CheckpointError(
            f"expert {missing} of layer {keys.layer} has no tensors in {index.path} "
            f"({stem}{keys.scheme.gate}{keys.scheme.weights[0]} and so on are missing), "
            f"but expert {count - 1} has"
        )
    return range(count)


def _find(index: SafetensorsIndex, keys: LayerKeys, expert: int, projection: str) -> Stack:
    scheme = keys.scheme
    stem = scheme.stem(keys.prefix, keys.layer, expert) + projection

    def find(suffixes: tuple[str, ...]) -> TensorInfo | None:
        found = (index.tensors.get(stem + suffix) for suffix in suffixes)
        return next((tensor for tensor in found if tensor is not None), None)

    weight = find(scheme.weights)
    if weight is None:
        others = [key for key in keys.keys if key.startswith(stem)]
        raise CheckpointError(
            f"{stem}{scheme.weights[0]}: this tensor of expert {expert} "
            f"of layer {keys.layer} is missing from {index.path}"
            + (f"; under that name there is only {', '.join(others)}" if others else "")
        )
    return Stack(weight, find(scheme.scales), find((scheme.bias,)))


def _stored(first: Stack, scheme: NamingScheme) -> Stored:
    dtype, scale = first.weight.dtype, first.scale
    stored = stored_as(dtype, scale.dtype if scale else None)
    if stored is not None:
        return stored
    if scale is None and any(row.scales and dtype in row.dtypes for row in STORED):
        raise CheckpointError(
            f"{_stem(first, scheme)}{scheme.scales[0]}: this tensor is missing beside "
            f"{first.weight.where}: {dtype} weights need scales"
        )
    raise CheckpointError(
        f"{scale.where if scale else first.weight.where}: {first.weight.key} is stored as "
        f"{describe_dtypes(dtype, scale.dtype if scale else None)}, which is no known format "
        f"({known_dtypes()})"
    )


def _stem(stack: Stack, scheme: NamingScheme) -> str:
    """The key of a projection without the suffix of its codes."""
    key = stack.weight.key
    return next(key.removesuffix(end) for end in scheme.weights if key.endswith(end))


def _expert_shape(weight: TensorInfo, scheme: NamingScheme) -> tuple[int, ...]:
    """Shape of the codes as [N, units], or [E, N, units] where experts are fused."""
    axes = 3 if scheme.fused else 2
    shape = weight.raw_shape
    if scheme.fused and len(shape) == 4:  # gpt-oss: [E, N, K/32, 16]
        shape = (*shape[:2], shape[2] * shape[3])
    if len(shape) != axes:
        raise CheckpointError(f"{weight.where}: shape {weight.shape}, expected {axes} axes")
    return shape


def _sizes(
    first: TensorInfo, down: TensorInfo, scheme: NamingScheme, stored: Stored
) -> tuple[int, int, bool]:
    """Hidden size, intermediate size, and whether fused tensors are [E, K, N]."""
    fmt = stored.format
    per_unit = 8 * fmt.code_dtype.itemsize // fmt.bits
    *_, rows, units = _expert_shape(first, scheme)
    if not scheme.fused:
        return units * per_unit, rows, False
    *_, down_rows, down_units = _expert_shape(down, scheme)
    if (rows, down_rows) == (2 * down_units * per_unit, units * per_unit):
        return down_rows, down_units * per_unit, False
    if per_unit == 1 and fmt.scale is None and (rows, units) == (down_units, 2 * down_rows):
        return rows, down_rows, True
    raise CheckpointError(
        f"{first.where}: shape {first.shape} does not go with shape {down.shape} of {down.key}: "
        "expected [experts, 2 intermediate, hidden] and [experts, hidden, intermediate], "
        "or both transposed"
    )


def _check_stack(stack: Stack, source: LayerSource, is_down: bool) -> None:
    scheme, reference = source.scheme, source.stacks[0][0]
    fmt = source.formats.down if is_down else source.formats.gate_up
    N, K = source.intermediate, source.hidden
    if is_down:
        N, K = K, N
    elif scheme.fused:
        N *= 2
    leading = (source.num_experts,) if scheme.fused else ()
    rows, units = fmt.code_shape(N, K)
    expected = (units, rows) if source.transposed else (rows, units)
    if _expert_shape(stack.weight, scheme) != (*leading, *expected):
        raise CheckpointError(
            f"{stack.weight.where}: shape {stack.weight.shape}, expected "
            f"{(*leading, *expected)} for {N} rows of {K} {fmt.name} weights"
        )
    _check_like(stack.weight, reference.weight, stack, scheme)
    _check_like(stack.scale, reference.scale, stack, scheme)
    _check_like(stack.bias, reference.bias, stack, scheme)
    scale_shape = (*leading, *(fmt.scale_shape(N, K) or ()))
    if stack.scale is not None and stack.scale.shape != scale_shape:
        raise CheckpointError(
            f"{stack.scale.where}: scales of shape {stack.scale.shape}, expected "
            f"{scale_shape} (one per {fmt.group} inputs)"
        )
    if stack.bias is not None:
        if stack.bias.dtype not in _BIAS_DTYPES:
            raise CheckpointError(
                f"{stack.bias.where}: a bias of dtype {stack.bias.dtype}, "
                f"expected {' or '.join(_BIAS_DTYPES)}"
            )
        if stack.bias.shape != (*leading, N):
            raise CheckpointError(
                f"{stack.bias.where}: shape {stack.bias.shape}, expected {(*leading, N)}"
            )


def _check_like(
    tensor: TensorInfo | None, reference: TensorInfo | None, stack: Stack, scheme: NamingScheme
) -> None:
    """All experts of a layer are stored alike: the same tensors with the same dtypes."""
    if tensor is None and reference is not None:
        endings = (*scheme.scales, scheme.bias)
        ending = next(end for end in endings if reference.key.endswith(end))
        raise CheckpointError(
            f"{_stem(stack, scheme)}{ending}: this tensor is missing beside {stack.weight.where}, "
            f"though {reference.where} exists"
        )
    if tensor is not None and reference is None:
        raise CheckpointError(
            f"{tensor.where}: unexpected: the layer's first expert has no such tensor"
        )
    if tensor is not None and reference is not None and tensor.dtype != reference.dtype:
        raise CheckpointError(
            f"{tensor.where}: dtype {tensor.dtype}, but {reference.key} is {reference.dtype}"
        )
