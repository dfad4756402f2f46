"""What whoever loads experts asks of a checkpoint's layer, whatever files it lies in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hybrid_moe.formats.table import Method, formats_under
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders.kt_kernel import REORDERED, KtSource
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.safetensors import ReadBuffer


class ExpertSource(Protocol):
    """The routed experts of one layer of a checkpoint. Everything that headers tell has been
    checked; data is read expert by expert."""

    @property
    def path(self) -> Path:
        """The checkpoint."""

    @property
    def layer(self) -> int:
        """Number of the layer, dense layers counted."""

    @property
    def num_experts(self) -> int:
        """Routed experts E."""

    @property
    def hidden(self) -> int:
        """Hidden size H."""

    @property
    def intermediate(self) -> int:
        """Intermediate size I of one expert."""

    @property
    def formats(self) -> LayerFormats:
        """Formats in which experts are handed on unless others are asked for: those stored."""

    @property
    def stored_types(self) -> str:
        """The file's own names of the types of the weights, for messages."""

    @property
    def state(self) -> str:
        """What tells its experts' values from those of any other: the files with their stamps, the
        layer, how gate and up lie."""

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys beside the experts' that do not change what the weights mean, and are not read."""

    @property
    def expert_nbytes(self) -> int:
        """Bytes that are read for one expert."""

    @property
    def last_key(self) -> str:
        """Key and file of the last expert's first weight, for messages."""

    def is_exact(self, formats: LayerFormats) -> bool:
        """Whether weights keep their values in `formats`; else they are rounded on the way."""

    def nbytes_as(self, formats: LayerFormats) -> int:
        """Bytes of all the layer's experts in `formats`, packed, with float32 biases."""

    def check_layout(self) -> None:
        """Raise `CheckpointError` where nothing tells how gate and up lie in fused tensors."""

    def with_layout(self, layout: GateUp | None) -> ExpertSource:
        """This layer with the layout of gate and up as the caller knows it; None changes nothing.

        Raises:
            ValueError: the model's own module has another one.
        """

    def told_layout(self, layout: GateUp) -> ExpertSource:
        """The same with the layout of the module that will compute the experts, which needs no
        other witness."""

    def expect(self, expert: int) -> None:
        """Let the kernel read an expert ahead."""

    def expert(
        self, expert: int, formats: LayerFormats | None = None, buffer: ReadBuffer | None = None
    ) -> ExpertTensors:
        """Read one expert. Thread-safe.

        Args:
            expert: 0 to num_experts - 1, the checkpoint's own numbering.
            formats: to hand it on in; None is `formats` of the layer. See `held_formats` for which
                others there are.
            buffer: memory to read into, which is reused: the arrays are then valid until the next
                call with it. None allocates.

        Returns:
            gate and up [I, H], down [H, I]. Rows may be strided, the last axis is contiguous.

        Raises:
            IndexError: no such expert.
            ValueError: weights stored so do not become these formats.
            CheckpointError: a file has been truncated, a scale is invalid, or a weight that has
                to be quantized is not finite.
        """


def check_sizes(
    source: ExpertSource,
    num_experts: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
) -> None:
    """Raise `CheckpointError` where a layer is not of the sizes that the caller expects."""
    for name, expected, actual in (
        ("num_experts", num_experts, source.num_experts),
        ("hidden_size", hidden, source.hidden),
        ("moe_intermediate_size", intermediate, source.intermediate),
    ):
        if expected is not None and expected != actual:
            raise CheckpointError(
                f"layer {source.layer} of {source.path} has {name}={actual}, not {expected} "
                f"(from {source.last_key})"
            )


def held_formats(source: ExpertSource, method: Method | None) -> LayerFormats:
    """The formats in which a layer's experts are held under `method`; None: those stored.

    Raises:
        ValueError: weights stored so do not become that; the message says which methods take them.
    """
    where = f"layer {source.layer} of {source.path}"
    if isinstance(source, KtSource) and method is not None and method.name in REORDERED:
        raise ValueError(
            f"{where} has kt-kernel's own matrices: those of its {method.name} are reordered by "
            "AOCL or KML, in ways that are not published, and are not read. If they were made for "
            f"AMX, use {method.name.replace('MOE_', 'AMX')}"
        )
    formats = formats_under(method, source.formats, where)
    for fmt, K in ((formats.gate_up, source.hidden), (formats.down, source.intermediate)):
        if K % fmt.k_multiple:
            raise ValueError(
                f"{where} has rows of {K} weights, which {fmt.name} does not hold: their length "
                f"must be a multiple of {fmt.k_multiple}"
            )
    return formats
