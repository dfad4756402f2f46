"""The arguments of the constructor that are about the wrapper's own GPU half, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.pack_parts import MOST_EXPERTS
from hybrid_moe.gpu_kernels.pack_tokens import MOST_EXPERTS_PER_TOKEN
from hybrid_moe.gpu_kernels.toolchain import availability
from hybrid_moe.runtime.arguments import LayerShape, check_mask, integer

BACKENDS = ("cute", "torch")
ACTIVATIONS = (None, "fp8")
PANELS = (None, "drop", "keep")


@dataclass(frozen=True, eq=False)
class HotOptions:
    """How the hot half is computed.

    Attributes:
        backend: "cute" or "torch".
        slots: experts for which the device has room.
        device: where.
        elsewhere: bool [E] on the CPU: experts that neither half computes.
        fp8_prefill: see `SlotExperts`.
        keep_panels: the CPU keeps the bytes of experts on the GPU.
    """

    backend: str
    slots: int
    device: torch.device
    elsewhere: torch.Tensor
    fp8_prefill: bool
    keep_panels: bool = False


def hot_options(
    backend: Any,
    slots: Any,
    device: Any,
    elsewhere: Any,
    activation: Any,
    panels: Any,
    mask: torch.Tensor,
    shape: LayerShape,
) -> HotOptions | None:
    """What `gpu_backend`, `gpu_slots`, `gpu_device`, `elsewhere`, `gpu_activation` and `gpu_panels`
    say; None without a back end.

    Args:
        mask: bool [E], the experts that are hot to begin with.

    Raises:
        TypeError, ValueError: an argument; the message names it.
        RuntimeError: there is no such device.
    """
    if backend is None:
        given = {
            "gpu_slots": slots,
            "gpu_device": device,
            "elsewhere": elsewhere,
            "gpu_activation": activation,
            "gpu_panels": panels,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} needs a gpu_backend: {' or '.join(map(repr, BACKENDS))}")
        return None
    if backend not in BACKENDS:
        raise ValueError(
            f"gpu_backend is {backend!r}, must be {', '.join(map(repr, BACKENDS))} or None"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gpu_activation is {activation!r}, must be None or 'fp8'")
    if panels not in PANELS:
        raise ValueError(f"gpu_panels is {panels!r}, must be 'drop' (or None) or 'keep'")
    _check_sizes(shape)
    hot = int(mask.sum())
    count = hot if slots is None else integer("gpu_slots", slots)
    if not hot <= count <= shape.num_experts:
        raise ValueError(
            f"gpu_slots is {count}, must be from {hot}, the experts that gpu_experts_mask puts on "
            f"the GPU, to num_experts {shape.num_experts}"
        )
    return HotOptions(
        backend,
        count,
        _device(backend, device),
        _elsewhere(elsewhere, mask, shape.num_experts),
        fp8_prefill=activation is not None,
        keep_panels=panels == "keep",
    )


def _check_sizes(shape: LayerShape) -> None:
    """Raise for what the kernels' routing has no room for (`gpu_kernels.pack_tokens`)."""
    for name, most in (
        ("num_experts", MOST_EXPERTS),
        ("num_experts_per_tok", MOST_EXPERTS_PER_TOKEN),
    ):
        if getattr(shape, name) > most:
            raise ValueError(
                f"{name} is {getattr(shape, name)}, must be at most {most} with a gpu_backend"
            )


def _device(backend: str, given: Any) -> torch.device:
    if given is None:
        kind = "cuda" if backend == "cute" or torch.cuda.is_available() else "cpu"
        device = torch.device(kind)
    else:
        try:
            device = torch.device(given)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"gpu_device is {given!r}, must be a device: {error}") from error
    if device.type == "cpu" and backend == "torch":
        return torch.device("cpu")  # as tensors name it: "cpu:0" is another
    if device.type != "cuda":
        choices = "a CUDA device" if backend == "cute" else 'a CUDA device or "cpu"'
        raise ValueError(f"gpu_device is {device}, must be {choices} with gpu_backend={backend!r}")
    if backend == "cute" and not (here := availability()).usable:
        raise RuntimeError(
            f"gpu_backend='cute': {here.reason}. gpu_backend='torch' needs no kernels of ours, "
            "and with gpu_device='cpu' no GPU"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"gpu_backend={backend!r} needs a CUDA device, and torch finds none: "
            'gpu_backend="torch", gpu_device="cpu" computes the hot half on the CPU'
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"gpu_device is {device}, but torch finds {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", index)


def _elsewhere(given: Any, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
    if given is None:
        return torch.zeros(num_experts, dtype=torch.bool, device="cpu")
    check_mask(given, num_experts, "elsewhere")
    elsewhere: torch.Tensor = given.detach().to("cpu", copy=True).contiguous()
    if bool((elsewhere & mask).any()):
        expert = int((elsewhere & mask).nonzero()[0])
        raise ValueError(
            f"elsewhere and gpu_experts_mask are both True for expert {expert}: an expert is "
            "computed in one place"
        )
    return elsewhere
