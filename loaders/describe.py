"""What the headers say of one layer's experts, checked in full before anything is read."""

from __future__ import annotations

import re
from collections.abc import Callable

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layer_source import LayerSource, Stack, StoredPair
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.naming import LayerKeys, NamingScheme
from hybrid_moe.loaders.quantization import NOTHING_SAID, Quantization
from hybrid_moe.loaders.safetensors import SafetensorsIndex
from hybrid_moe.loaders.stacks import check_stacks, expert_shape, stem_of
from hybrid_moe.loaders.stored import STORED, Packing, Stored, describe_dtypes, known_dtypes

_UNUSED = re.compile(r"[._]input_(global_)?scale$")
"""Tensors beside an expert's weights that do not change what they mean: scales for activations that
are quantized elsewhere and not here."""
_SHAPE = re.compile(r"\.weight_shape$")
"""The shape that codes are packed from, which theirs says too."""


def describe_layer(
    index: SafetensorsIndex,
    keys: LayerKeys,
    ask_model: Callable[[], GateUp | None],
    quantization: Quantization = NOTHING_SAID,
) -> LayerSource:
    """Find and check all tensors of a layer's experts.

    Args:
        ask_model: the layout of gate and up in the model's own module; asked only when needed.
        quantization: what `config.json` says of it.

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
    stored = StoredPair(_stored(first, scheme, quantization), _stored(down, scheme, quantization))
    num_experts = expert_shape(first.weight, scheme)[0] if scheme.fused else len(experts)
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
        stored=stored,
        transposed=transposed,
        stacks=stacks,
        unused=_unused(index, keys, stacks),
        ask_model=ask_model,
        quantization=quantization,
    )
    for stack, fmt, K in (
        (first, stored.gate_up.format, hidden),
        (down, stored.down.format, intermediate),
    ):
        if K == 0 or K % fmt.k_multiple:
            raise CheckpointError(
                f"{stack.weight.where}: {fmt.name} rows of {K} weights; "
                f"the length must be a multiple of {fmt.k_multiple}"
            )
    shared = stored.gate_up.format.scale_rows
    if scheme.fused and intermediate % shared:
        raise CheckpointError(
            f"{first.weight.where}: {intermediate} rows of gate and as many of up are no whole "
            f"blocks of {shared}: some share their {stored.gate_up.format.name} scales"
        )
    check_stacks(source)
    return source


def _unused(
    index: SafetensorsIndex, keys: LayerKeys, stacks: tuple[tuple[Stack, ...], ...]
) -> tuple[str, ...]:
    """Keys of the layer's experts that are not read, all of them harmless."""
    read = {t.key for expert_stacks in stacks for stack in expert_stacks for t in stack.tensors}
    beside = (key for key in (*keys.keys, *keys.foreign) if key not in read)
    unused = [key for key in beside if not _SHAPE.search(key)]
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
    if scheme.fused:
        return Stack(weight, find(scheme.scales), find((scheme.bias,)))
    return Stack(
        weight,
        find(scheme.scales),
        find((scheme.bias,)),
        find(scheme.zeros),
        find(scheme.factors),
        find(scheme.orders),
    )


def _stored(first: Stack, scheme: NamingScheme, quantization: Quantization) -> Stored:
    """How the tensors of a projection are stored, by their dtypes and shapes."""
    weight, scale = first.weight, first.scale
    dtypes = (weight.dtype, None if scale is None else scale.dtype)
    rows = [row for row in STORED if row.takes(weight.key, *dtypes, first.zeros is not None)]
    if not rows:
        raise _unknown(first, scheme)
    shape = expert_shape(weight, scheme)
    experts = shape[: len(shape) - 2]
    expected: dict[tuple[int, ...], str] = {}
    multiple = 0
    refusals: dict[Packing, str | None] = {}
    for row in rows:
        N, K = row.sizes(shape, weight.dtype)
        shapes = [(*experts, *s) for s in row.scale_shapes(N, K)]
        if scale is not None and scale.shape not in shapes:
            expected.setdefault(shapes[0], row.format.name)
            refusals[row.packing] = quantization.refusal(row.packing)
        elif K % row.format.k_multiple and scale is not None:
            multiple = row.format.k_multiple
        elif row.says(quantization):
            refusal = quantization.refusal(row.packing)
            if refusal is not None:
                raise CheckpointError(f"{weight.where}: {refusal}")
            return row
    for refusal in refusals.values():
        if refusal is not None:
            raise CheckpointError(f"{weight.where}: {refusal}")
    assert scale is not None
    about = f"{weight.key} is stored as {describe_dtypes(*dtypes)} of shape {scale.shape}"
    if multiple:
        raise CheckpointError(
            f"{scale.where}: {about}: rows of {K} weights, whose length must be a multiple of "
            f"{multiple}"
        )
    words = [f"{shape} ({name})" for shape, name in expected.items()]
    raise CheckpointError(f"{scale.where}: {about}, expected {' or '.join(words)}")


def _unknown(first: Stack, scheme: NamingScheme) -> CheckpointError:
    """What is wrong with tensors that no row takes."""
    weight, scale, zeros = first.weight, first.scale, first.zeros
    dtype, scale_dtype = weight.dtype, None if scale is None else scale.dtype
    if scale is None and any(row.scales and row.has_codes(weight.key, dtype) for row in STORED):
        return CheckpointError(
            f"{stem_of(first, scheme)}{scheme.scales[0]}: this tensor is missing beside "
            f"{weight.where}: {dtype} weights need scales"
        )
    if any(row.takes(weight.key, dtype, scale_dtype, zeros is None) for row in STORED):
        if zeros is None:
            return CheckpointError(
                f"{stem_of(first, scheme)}{scheme.zeros[0]}: this tensor is missing beside "
                f"{weight.where}: these weights need zero points"
            )
        return CheckpointError(
            f"{zeros.where}: zero points beside {describe_dtypes(dtype, scale_dtype)} are not read"
        )
    return CheckpointError(
        f"{scale.where if scale else weight.where}: {weight.key} is stored as "
        f"{describe_dtypes(dtype, scale_dtype)}, which is no known format ({known_dtypes()})"
    )


def _sizes(
    first: TensorInfo, down: TensorInfo, scheme: NamingScheme, stored: StoredPair
) -> tuple[int, int, bool]:
    """Hidden size, intermediate size, and whether fused tensors are [E, K, N]."""
    rows, inputs = stored.gate_up.sizes(expert_shape(first, scheme), first.dtype)
    if not scheme.fused:
        return inputs, rows, False
    down_rows, down_inputs = stored.down.sizes(expert_shape(down, scheme), down.dtype)
    if (rows, down_rows) == (2 * down_inputs, inputs):
        return down_rows, down_inputs, False
    plain = all(s.format.scale is None for s in stored)
    if plain and (rows, inputs) == (down_inputs, 2 * down_rows):
        return rows, down_rows, True
    raise CheckpointError(
        f"{first.where}: shape {first.shape} does not go with shape {down.shape} of {down.key}: "
        "expected [experts, 2 intermediate, hidden] and [experts, hidden, intermediate], "
        "or both transposed"
    )
