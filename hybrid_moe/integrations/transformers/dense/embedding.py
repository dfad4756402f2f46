"""Tied embeddings: rows of the output layer's packed weight."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch

from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.packed_module import PackedModule
from hybrid_moe.runtime import dense_op, torch_op

Model = TypeVar("Model", bound=torch.nn.Module)


class HybridEmbedding(PackedModule, torch.nn.Embedding):
    """An embedding whose rows are those of a `HybridLinear`, which holds them: the same weight
    looked up by ids. Rows have the stored bits; quantised ones are dequantised. Inference only, so
    `padding_idx`, which concerns gradients, changes nothing.
    """

    def __init__(self, linear: HybridLinear, where: str, padding_idx: int | None = None) -> None:
        """Take the weight of `linear`; the two modules have one parameter, as if tied by torch.

        Args:
            linear: [num_embeddings, embedding_dim].
            where: the module's name in its model, for messages.
            padding_idx: of the embedding in whose place it stands.
        """
        torch.nn.Module.__init__(self)
        self._take(linear._held, _look_up)
        self._where = where
        self.num_embeddings, self.embedding_dim = linear.out_features, linear.in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._fix_parameters(weight=linear.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids of any shape [...] -> [..., embedding_dim].

        Raises:
            TypeError: no int32 or int64 tensor. IndexError: an id that no row has.
            RuntimeError: the weight is not loaded, or this is a forked child.
        """
        if not isinstance(input, torch.Tensor) or input.dtype not in (torch.int64, torch.int32):
            what = getattr(input, "dtype", type(input).__name__)
            raise TypeError(f"{self._where}: ids must be an int32 or int64 tensor, not {what}")
        if torch_op.is_traced(input) or input.is_meta:
            return dense_op.embedding(
                input, self._handle.value, self.embedding_dim, self._held.dtype
            )
        return _look_up(self, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows of {self._held.where}"


def _look_up(module: HybridEmbedding, ids: torch.Tensor) -> torch.Tensor:
    held = module._held
    wanted = ids.detach().to("cpu", torch.int64).reshape(-1).numpy()
    try:
        rows = held.rows(wanted)
    except IndexError as error:
        raise IndexError(f"{module._where}: {error}") from error
    return rows.view(*ids.shape, module.embedding_dim).to(ids.device)


def why_not_tied(embedding: torch.nn.Module) -> str | None:
    """Why `embedding` cannot become a `HybridEmbedding` of the output layer that it is tied to: it
    computes more than a look-up, and stays with torch; or None. For a message after its name."""
    if type(embedding) is not torch.nn.Embedding:
        return f"is a {type(embedding).__name__}, which may do more than look up rows"
    if embedding.max_norm is not None:
        return "has a max_norm, which changes rows as they are looked up"
    if embedding._forward_pre_hooks or embedding._forward_hooks or hasattr(embedding, "_hf_hook"):
        return "has hooks"
    return None


def refuse_resizing(model: Model) -> Model:
    """Make `model.resize_token_embeddings` raise where it would change the number of rows, before
    it reads them all. What changes nothing passes. For models with a packed embedding or output
    layer, once they are packed."""
    if hasattr(model, "resize_token_embeddings"):
        # a bound method: a copy of the model gets one of its own
        model.resize_token_embeddings = MethodType(_resize, model)  # type: ignore[assignment]
    return model


def _resize(
    self: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    **kwargs: Any,
) -> Any:
    rows = self.get_input_embeddings().weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        raise RuntimeError(
            f"the embedding of {type(self).__name__} has {rows} rows packed by hybrid_moe and "
            f"cannot be resized to {wanted}: resize and save the model in plain Transformers "
            'first, or load it with dense="torch"'
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, **kwargs)
