"""What `quantization_config` says that the tensors of GPTQ, AWQ and compressed-tensors do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SECTIONS = ("quantization_config", "compression_config")
_READ = ("gptq", "awq", "compressed-tensors")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint was quantized, as far as its configuration tells.

    Attributes:
        method: `quant_method`, in lower case; "" where nothing is said.
        bits: of a code; None where nothing is said.
        symmetric: zero points are all the middle of the codes; None where nothing is said.
        act_order: inputs were reordered by their activations (`desc_act`, `actorder`).
        version: of the packing: GPTQ's `checkpoint_format`, AWQ's `version`; in lower case.
    """

    method: str = ""
    bits: int | None = None
    symmetric: bool | None = None
    act_order: bool = False
    version: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantization:
        """What a `config.json` says; a language model's part of it counts too."""
        text = config.get("text_config")
        for part in (config, text if isinstance(text, dict) else {}):
            for name in _SECTIONS:
                section = part.get(name)
                if isinstance(section, dict):
                    return cls._of_section(section)
        return cls()

    @classmethod
    def _of_section(cls, section: Mapping[str, Any]) -> Quantization:
        method = _text(section.get("quant_method"))
        if method == "compressed-tensors":
            weights = _weights_of_groups(section)
            return cls(
                method,
                _integer(weights.get("num_bits")),
                _flag(weights.get("symmetric")),
                weights.get("actorder") in (True, "group"),
            )
        version = section.get("version" if method == "awq" else "checkpoint_format")
        return cls(
            method,
            _integer(section.get("bits")),
            _flag(section.get("sym")),
            _flag(section.get("desc_act")) is True,
            _text(version),
        )

    def refusal(self, packing: str) -> str | None:
        """Why matrices packed in this way are not read; None if they are.

        Args:
            packing: see `stored.Packing`.
        """
        if packing == "rows":
            return None
        if self.method not in ("", packing):
            if self.method in _READ:
                return f"the tensors are {packing}'s, but config.json says {self.method}"
            return None  # of another part of the model, perhaps
        if self.bits not in (None, 4):
            return f"{packing} with {self.bits} bits is not read, only 4 bits are"
        if self.act_order:
            return (
                f"{packing} with desc_act (act-order) is not read: its groups are scattered over "
                "the inputs"
            )
        versions = {"gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}.get(packing, ("",))
        if self.version not in versions:
            known = " or ".join(name for name in versions if name)
            return f"{packing} packed as {self.version!r} is not read, only as {known}"
        return None

    @property
    def zeros_offset(self) -> int:
        """What GPTQ's stored zero points lack: 1 in its first format, 0 in its second."""
        return 0 if self.version == "gptq_v2" else 1


NOTHING_SAID = Quantization()
"""Of a checkpoint without a configuration."""


def _weights_of_groups(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` of compressed-tensors' first group."""
    groups = section.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _text(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
