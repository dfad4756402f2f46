"""`weight` and `bias` of a layer whose weights are packed: tensors that are unpacked when read.

A `PackedWeight` says its shape, dtype and device for nothing. An operation that reads its values
gets a plain tensor that is unpacked (dequantised) for it and freed afterwards; views are taken of
what is unpacked when they are read, and of rows (an index, a slice, an embedding) only these rows.
Whatever would write is refused by name: the strips would not change, so the write would be lost.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from hybrid_moe.integrations.transformers.dense.held import HeldMatrix

_aten = torch.ops.aten

Read = Callable[[], torch.Tensor]


class PackedWeight(torch.Tensor):
    """The weight or the bias of a `HeldMatrix`, or a view of it. Made by `parameter`.

    Attributes:
        held: the packed matrix. A copy of this tensor shares it.
        part: "weight" or "bias".
        whole: it is the weight [N, K] or the bias [N] itself, and no view.
    """

    held: HeldMatrix
    part: str
    whole: bool
    _read: Read

    # Nothing is done to functions of torch: they arrive, taken apart, in __torch_dispatch__
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, held: HeldMatrix, part: str, read: Read, like: torch.Tensor, whole: bool = False
    ) -> PackedWeight:
        """`like`, on meta, has the shape, strides and dtype of what `read` returns."""
        with torch.inference_mode(False):  # also in inference mode a view of a normal one is one
            self: PackedWeight = torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                storage_offset=like.storage_offset(),
                dtype=like.dtype,
                device=torch.device("cpu"),
            )
        self.held, self.part, self.whole, self._read = held, part, whole, read
        return self

    @property
    def label(self) -> str:
        """The module's name and this one's, for messages."""
        return f"{self.held.where}.{self.part}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                for written in tree_leaves(given):
                    if isinstance(written, PackedWeight):
                        written._refuse(func.name())
        if torch.is_inference_mode_enabled():  # elsewhere autograd has taken these apart
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self = args[0] if args else None
        if isinstance(self, PackedWeight):
            if func is _aten.is_pinned.default:
                return False
            if func in _WITHOUT_VALUES:
                return func(self._like(), *args[1:], **{**kwargs, "device": _device(kwargs)})
            rows = _ROWS.get(func)
            if rows is not None and self.whole and self.part == "weight":
                result = rows(self, *args[1:], **kwargs)
                if result is not None:
                    return result
            if _is_view(func):
                return self._view(func, args[1:], kwargs)
        return func(*tree_map(values, list(args)), **tree_map(values, kwargs))

    def _like(self) -> torch.Tensor:
        """Its shape, strides and dtype, without values."""
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def _view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A view, or several, of what will be unpacked when it is read."""
        likes = func(self._like(), *args, **kwargs)
        if isinstance(likes, torch.Tensor):
            same = self.whole and func in _SAME
            read = self._read if same else lambda: func(self._read(), *args, **kwargs)
            return PackedWeight(self.held, self.part, read, likes, same)

        def one(index: int) -> Read:
            return lambda: func(self._read(), *args, **kwargs)[index]

        return [PackedWeight(self.held, self.part, one(i), like) for i, like in enumerate(likes)]

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{self.label} is packed by hybrid_moe and is not changed ({what}): merge adapters, "
            "resize, convert or move the model before its layers are packed (or load it with "
            'dense="torch"); load_state_dict takes a whole new weight'
        )

    # What torch does without a dispatch

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value is not self:
            self._refuse("data =")

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise RuntimeError(f"{self.label} is packed by hybrid_moe: inference only, no gradient")
        return self

    def share_memory_(self) -> NoReturn:
        self._refuse("share_memory_")

    def is_shared(self) -> bool:
        return False

    def data_ptr(self) -> NoReturn:
        raise RuntimeError(f"{self.label} is packed by hybrid_moe: it has no address; clone() it")

    def storage(self) -> NoReturn:
        raise RuntimeError(f"{self.label} is packed by hybrid_moe: it has no storage; clone() it")

    typed_storage = storage

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return values(self).numpy(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return values(self).__array__(*args, **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return values(self).__dlpack__(**kwargs)

    def tolist(self) -> Any:
        return values(self).tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}({values(self).__repr__(**kwargs)}, {self.held.matrix.fmt.name})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if not self.whole:
            raise RuntimeError(f"a view of {self.label} cannot be copied: clone() it")
        return parameter(copy.deepcopy(self.held, memo), bias=self.part == "bias")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{self.label} is packed by hybrid_moe and cannot be pickled: save_pretrained writes "
            "it, and clone() gives a plain tensor"
        )


def parameter(held: HeldMatrix, *, bias: bool = False) -> PackedWeight:
    """The weight [N, K] or bias [N] of `held`, as what `torch.nn.Parameter` takes for its own."""
    shape = (held.matrix.rows,) if bias else (held.matrix.rows, held.matrix.inputs)
    like = torch.empty(shape, dtype=held.dtype, device="meta")
    part = "bias" if bias else "weight"
    made = PackedWeight(held, part, held.bias if bias else held.weight, like, whole=True)
    made._is_param = True  # isinstance(made, torch.nn.Parameter)
    made._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers leaves it alone
    return made


def values(x: Any) -> Any:
    """The plain tensor of a `PackedWeight`; anything else as it is."""
    return x._read() if isinstance(x, PackedWeight) else x


_SAME = {_aten.detach.default, _aten.alias.default}

_WITHOUT_VALUES = {
    packet.default
    for packet in (
        _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like,
        _aten.randn_like, _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full,
        _aten.new_empty_strided,
    )
}  # fmt: skip
"""Make a tensor of the same kind; all take a device."""


def _device(kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("device")
    return torch.device("cpu") if given is None else given


def _is_view(func: Any) -> bool:
    info = func._schema.arguments[0].alias_info
    return info is not None and not info.is_write


# Rows alone. Each returns None where what is asked for is not, or is most of the matrix.


def _some(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor | None:
    """Rows of any shape of ids, in which negative ones count from the end."""
    N, K = weight.shape
    if ids.dtype not in (torch.int64, torch.int32) or ids.is_meta or 2 * ids.numel() > N:
        return None
    wanted = ids.detach().to("cpu", torch.int64).reshape(-1).numpy()
    rows = weight.held.rows(np.where(wanted < 0, wanted + N, wanted))
    return rows.view(*ids.shape, K)


def _embedding(weight: PackedWeight, ids: torch.Tensor, *_: Any, **__: Any) -> Any:
    if (ids < 0).any():
        raise IndexError(f"{weight.label}: a row below 0")
    return _some(weight, ids)


def _index(weight: PackedWeight, indices: Sequence[torch.Tensor | None]) -> Any:
    ids = indices[0] if len(indices) == 1 else None
    if ids is None:
        return None
    if ids.dtype is torch.bool:
        if ids.shape != weight.shape[:1]:
            return None
        ids = ids.nonzero().flatten()
    return _some(weight, ids)


def _index_select(weight: PackedWeight, dim: int, ids: torch.Tensor) -> Any:
    return _some(weight, ids) if dim in (0, -2) and ids.dim() == 1 else None


def _lazy(func: Any, weight: PackedWeight, *args: Any, **kwargs: Any) -> Any:
    """A view of rows: those of the row numbers that the same view takes."""
    dim = args[0] if args else 0
    if dim not in (0, -2) or kwargs:
        return None
    N, K = weight.shape
    ids = func(torch.arange(N, device="cpu")[:, None], 0, *args[1:])[..., 0]
    if 2 * ids.numel() > N:
        return None
    like = func(weight._like(), 0, *args[1:])
    like = torch.empty(like.shape, dtype=like.dtype, device="meta")

    def read() -> torch.Tensor:
        return weight.held.rows(ids.reshape(-1).numpy()).view(*ids.shape, K)

    return PackedWeight(weight.held, weight.part, read, like)


_ROWS: dict[Any, Callable[..., Any]] = {
    _aten.embedding.default: _embedding,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    **{view: functools.partial(_lazy, view) for view in (_aten.select.int, _aten.slice.Tensor)},
}
