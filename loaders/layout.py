"""Where gate and up lie in a fused tensor: its name does not tell, the model's own module does.

`mlp.experts.gate_up_proj` holds gate and up one after the other in every family but gpt-oss, which
lets their rows alternate; nothing else in the files differs, biases included. Transformers' class
of the family is built without memory and asked which columns its gate takes.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

from hybrid_moe.loaders.model_config import ModelConfig, transformers_text_config

logger = logging.getLogger(__name__)

GateUp = Literal["halves", "interleaved"]
"""All gate rows, then all up rows; or one of each in turn."""

KNOWN: dict[str, GateUp] = {"gpt_oss": "interleaved"}
"""By `model_type`: families whose answer is needed without Transformers, too."""


def gate_up_layout(name: str | None) -> GateUp | None:
    """The layout of that name; None stays None.

    Raises:
        ValueError: there is none.
    """
    for layout in get_args(GateUp):
        if name == layout:
            return layout  # type: ignore[no-any-return]
    if name is None:
        return None
    raise ValueError(f"gate_up_layout is {name!r}, must be {' or '.join(get_args(GateUp))}")


def layout_of_model(config: ModelConfig) -> GateUp | None:
    """How the experts of this model take gate and up; None where nobody knows the model.

    Imports Transformers unless the family is in `KNOWN`.
    """
    for part in (config.stated, config.raw):
        family = part.get("model_type")
        if isinstance(family, str) and family in KNOWN:
            return KNOWN[family]
    text = transformers_text_config(config.raw)
    if text is None:
        return None
    try:
        answers = {layout_of_module(module) for module in _experts(text)}
    except Exception as error:  # a family's class may raise anything
        logger.warning(
            "the experts of model_type %s cannot be asked for their layout (%s: %s)",
            text.model_type,
            type(error).__name__,
            error,
        )
        return None
    return answers.pop() if len(answers) == 1 else None


def _experts(text: Any) -> list[Any]:
    """Experts modules of Transformers' model of a configuration, on the meta device."""
    import torch
    from transformers import AutoModel

    if getattr(text, "quantization_config", None) is not None:
        del text.quantization_config
    with torch.device("meta"):
        model = AutoModel.from_config(text)
    return [m for m in model.modules() if hasattr(m, "_apply_gate")]


def layout_of_module(module: Any) -> GateUp | None:
    """How a Transformers experts module takes gate and up from one row; None for neither way.

    The module's parameters may be on meta: only `_apply_gate` runs, on eight columns.
    """
    import torch

    ones = torch.ones(1, 8, device="cpu")

    def outputs_of(column: int) -> tuple[list[int], float]:
        """Outputs that change with a column, and their largest magnitude when it is -64."""
        changed = ones.clone()
        changed[0, column] = -64.0
        with torch.no_grad():
            before, after = module._apply_gate(ones)[0], module._apply_gate(changed)[0]
        where = (before != after).nonzero().flatten()
        return where.tolist(), float(after[where].abs().max()) if len(where) else 0.0

    for layout, gate, up in (("halves", 1, 5), ("interleaved", 2, 3)):
        (gate_moves, gated), (up_moves, scaled) = outputs_of(gate), outputs_of(up)
        # a very negative gate closes the output, a very negative up does not
        if gate_moves == up_moves == [1] and gated < 1e-6 < scaled:
            return gate_up_layout(layout)
    return None
