"""Which experts of a layer live on the GPU, and in which slot.

The GPU's weights are tensors [slots, ...]; expert `hot[s]` has slot s. Router ids become slots
through a table on the device, so any set of experts can be there, not only the first ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hybrid_moe.placement.profile import read_profile
from hybrid_moe.placement.ranks import experts_of_rank
from hybrid_moe.placement.routed_masks import is_routing_file, placement_of_number

PROFILE = "HYBRID_MOE_PLACEMENT"
"""Environment variable: a placement profile (`hybrid_moe.placement.profile`), or a routing profile
(`hybrid_moe.placement.routing_profile`)."""


@dataclass(frozen=True)
class GpuExperts:
    """The hot experts of one layer.

    Attributes:
        num_experts: routed experts E.
        hot: ids of the experts on the GPU, ascending; the place of an id is its slot.
        by_rank: those of each of several GPUs, where a profile says it.
    """

    num_experts: int
    hot: tuple[int, ...]
    by_rank: tuple[tuple[int, ...], ...] | None = None

    @property
    def count(self) -> int:
        """Slots."""
        return len(self.hot)

    @property
    def all_hot(self) -> bool:
        """Nothing is left for the CPU."""
        return self.count == self.num_experts

    @cached_property
    def slot_of(self) -> dict[int, int]:
        """Expert id -> slot."""
        return {expert: slot for slot, expert in enumerate(self.hot)}

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool [E] on the CPU, True for hot experts."""
        mask = torch.zeros(self.num_experts, dtype=torch.bool)
        mask[list(self.hot)] = True
        return mask

    def slot_table(self, device: torch.device) -> torch.Tensor:
        """int32 [E + 1]: the slot of each id, -1 for cold ones; the last entry is for ids that
        name no expert."""
        table = torch.full((self.num_experts + 1,), -1, dtype=torch.int32)
        table[list(self.hot)] = torch.arange(self.count, dtype=torch.int32)
        return table.to(device)

    def to_slots(self, topk_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Ids of any shape as slots, -1 where the GPU has nothing to do; a new tensor.

        Queues kernels only: safe under graph capture.
        """
        known = topk_ids.to(torch.int64).clamp(-1, self.num_experts)  # -1 is the last entry too
        return table[known].to(topk_ids.dtype)


@dataclass(frozen=True)
class RankExperts:
    """What one tensor parallel rank computes of a layer where the experts on GPUs are this
    package's: whole experts, and on rank 0 all those on the CPU. The outputs of the ranks are
    parts of a sum.

    Attributes:
        hot: experts in slots of this rank's GPU.
        elsewhere: bool [E] on the CPU, True for experts of other ranks.
    """

    hot: GpuExperts
    elsewhere: torch.Tensor

    @classmethod
    def of(cls, hot: GpuExperts, layer_idx: int, rank: int, ranks: int) -> RankExperts:
        """The share of `rank` in the layer's hot experts.

        Raises:
            ValueError: the placement was made for another number of GPUs.
        """
        if hot.by_rank is None or ranks == 1:
            ids = experts_of_rank(hot.hot, layer_idx, rank, ranks)
        elif len(hot.by_rank) == ranks:
            ids = hot.by_rank[rank]
        else:
            raise ValueError(
                f"the placement of layer {layer_idx} is for {len(hot.by_rank)} GPUs, but there are "
                f"{ranks}: make it again with `hybrid-moe serve --profile`"
            )
        own = GpuExperts(hot.num_experts, ids)
        others = ~own.mask if rank else hot.mask & ~own.mask
        return cls(own, others)

    @property
    def any_cold(self) -> bool:
        """The rank has a CPU side."""
        return not bool((self.hot.mask | self.elsewhere).all())

    @property
    def any(self) -> bool:
        """There is something to compute."""
        return not bool(self.elsewhere.all())


def choose(
    layer_idx: int,
    num_experts: int,
    num_gpu_experts: int | None,
    environ: Mapping[str, str] = os.environ,
) -> GpuExperts:
    """The hot experts of a layer: the profile's, or the first `num_gpu_experts` (None for none).

    With a routing profile `num_gpu_experts` is how many a layer has on average: as much memory, for
    the most used experts of the whole model.

    Raises:
        ValueError: a number outside 0..E, or a profile that is damaged or does not fit.
        FileNotFoundError: the profile does not exist.
    """
    path = environ.get(PROFILE)
    count = 0 if num_gpu_experts is None else num_gpu_experts
    if path:
        file = Path(path).expanduser()
        routed = file.is_file() and is_routing_file(file)
        profile = placement_of_number(file, count) if routed else read_profile(path)
        experts = profile.experts_of(layer_idx, num_experts)
        return GpuExperts(num_experts, experts, profile.ranks.get(layer_idx))
    if not 0 <= count <= num_experts:
        raise ValueError(
            f"--kt-num-gpu-experts is {count}, must be between 0 and the {num_experts} experts of "
            f"layer {layer_idx}"
        )
    return GpuExperts(num_experts, tuple(range(count)))
