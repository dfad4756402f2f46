"""The tensors of every expert, checked against those of the first one."""

from __future__ import annotations

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layer_source import LayerSource, Stack
from hybrid_moe.loaders.naming import NamingScheme
from hybrid_moe.loaders.stored import Stored

_BIAS_DTYPES = ("BF16", "F32", "F16")


def stem_of(stack: Stack, scheme: NamingScheme) -> str:
    """The key of a projection without the suffix of its codes."""
    key = stack.weight.key
    return next(key.removesuffix(end) for end in scheme.weights if key.endswith(end))


def expert_shape(weight: TensorInfo, scheme: NamingScheme) -> tuple[int, ...]:
    """Shape of the codes as [N, units], or [E, N, units] where experts are fused.

    Raises:
        CheckpointError: it has other axes.
    """
    axes = 3 if scheme.fused else 2
    shape = weight.raw_shape
    if scheme.fused and len(shape) == 4:  # gpt-oss: [E, N, K/32, 16]
        shape = (*shape[:2], shape[2] * shape[3])
    if len(shape) != axes:
        raise CheckpointError(f"{weight.where}: shape {weight.shape}, expected {axes} axes")
    return shape


def check_stacks(source: LayerSource) -> None:
    """Raise `CheckpointError` for the first tensor of a layer's experts that is not as it must be.

    All experts of a layer are stored alike, and so are gate and up.
    """
    references = source.stacks[0]
    for stacks in source.stacks:
        for index, stack in enumerate(stacks):
            is_down = stack is stacks[-1]
            stored = source.stored.down if is_down else source.stored.gate_up
            reference = references[index] if is_down else references[0]
            _check_like(stack.bias, references[0].bias, stack, source.scheme, (source.scheme.bias,))
            _check_stack(stack, reference, source, stored, is_down=is_down)


def _check_stack(
    stack: Stack, reference: Stack, source: LayerSource, stored: Stored, *, is_down: bool
) -> None:
    scheme, weight = source.scheme, stack.weight
    N, K = source.intermediate, source.hidden
    if is_down:
        N, K = K, N
    elif scheme.fused:
        N *= 2
    leading = (source.num_experts,) if scheme.fused else ()
    rows, units = stored.code_shape(N, K, weight.dtype)
    expected = (*leading, units, rows) if source.transposed else (*leading, rows, units)
    _check_like(weight, reference.weight, stack, scheme, ())
    if expert_shape(weight, scheme) != expected:
        raise CheckpointError(
            f"{weight.where}: shape {weight.shape}, expected {expected} for {N} rows of {K} "
            f"{stored.format.name} weights"
        )
    _check_like(stack.scale, reference.scale, stack, scheme, scheme.scales)
    _check_like(stack.zeros, reference.zeros, stack, scheme, scheme.zeros)
    _check_like(stack.factor, reference.factor, stack, scheme, scheme.factors)
    _check_like(stack.order, reference.order, stack, scheme, scheme.orders)
    _check_scales(stack, source, stored, N, K, leading)
    if stack.bias is not None:
        _check_dtype(stack.bias, "a bias", _BIAS_DTYPES)
        _check_shape(stack.bias, (*leading, N))
    if stack.zeros is not None:
        _check_dtype(stack.zeros, "zero points", ("I32",))
        _check_shape(stack.zeros, stored.zeros_shape(N, K))
    if stack.order is not None:
        _check_dtype(stack.order, "the groups of inputs", ("I32",))
        _check_shape(stack.order, (K,))


def _check_scales(
    stack: Stack, source: LayerSource, stored: Stored, N: int, K: int, leading: tuple[int, ...]
) -> None:
    """Raise unless the scales, and the factor of the whole matrix, are of this matrix."""
    fmt, scale, factor = stored.format, stack.scale, stack.factor
    shapes = [(*leading, *shape) for shape in stored.scale_shapes(N, K)]
    if scale is not None and scale.shape not in shapes:
        per = f"one per {fmt.group} inputs" if fmt.group else "one per row"
        if fmt.scale_rows > 1:
            per = f"one per {fmt.group} inputs of {fmt.scale_rows} rows"
        raise CheckpointError(
            f"{scale.where}: scales of shape {scale.shape}, expected {shapes[0]} ({per})"
        )
    if fmt.plane("factors") is None:
        if factor is not None:
            raise CheckpointError(
                f"{factor.where}: a factor of the whole matrix, which {fmt.name} does not have"
            )
    elif factor is None:
        raise CheckpointError(
            f"{stem_of(stack, source.scheme)}{source.scheme.factors[0]}: this tensor is missing "
            f"beside {stack.weight.where}: {fmt.name} needs the factor of the whole matrix"
        )
    else:
        _check_dtype(factor, "a factor of a whole matrix", ("F32",))
        if factor.shape not in ((), (1,)):
            _check_shape(factor, ())


def _check_dtype(tensor: TensorInfo, what: str, known: tuple[str, ...]) -> None:
    if tensor.dtype not in known:
        raise CheckpointError(
            f"{tensor.where}: {what} of dtype {tensor.dtype}, expected {' or '.join(known)}"
        )


def _check_shape(tensor: TensorInfo, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {expected}")


def _check_like(
    tensor: TensorInfo | None,
    reference: TensorInfo | None,
    stack: Stack,
    scheme: NamingScheme,
    endings: tuple[str, ...],
) -> None:
    """Raise unless a tensor is there where the first expert's is, with its dtype."""
    if tensor is None and reference is not None:
        ending = next(end for end in endings if reference.key.endswith(end))
        raise CheckpointError(
            f"{stem_of(stack, scheme)}{ending}: this tensor is missing beside "
            f"{stack.weight.where}, though {reference.where} exists"
        )
    if tensor is not None and reference is None:
        raise CheckpointError(
            f"{tensor.where}: unexpected: the layer's first expert has no such tensor"
        )
    if tensor is not None and reference is not None and tensor.dtype != reference.dtype:
        raise CheckpointError(
            f"{tensor.where}: dtype {tensor.dtype}, but {reference.key} is {reference.dtype}"
        )
