"""What routers do with their logits: a table of scorings, and a model's numbers.

The order of experts is the same everywhere: the larger value comes first, of equal values the lower
id, and NaN is larger than all. So a token's experts depend neither on its batch nor on the launch.

torch.topk promises no order among equal values. On a GPU it takes the lower ids; on a CPU whatever
std::nth_element or std::partial_sort leaves in front. Where the k-th value is tied, a model's own
router on the CPU may therefore choose another of the tied experts, with the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_EXPERTS = 1024
"""A lane holds up to 32 of them in registers."""

MOST_CHOSEN = 32
"""A lane of the warp keeps one choice."""

MOST_GROUPS = 32
"""A lane of the warp keeps one group's score."""


@dataclass(frozen=True)
class Scoring:
    """What a router does with its logits.

    Attributes:
        function: logits -> scores: "softmax" over all experts, "softmax_of_chosen", "sigmoid" or
            "sqrtsoftplus".
        by_score: experts are chosen by score (and bias); else by logit. Softmax keeps the order, so
            choosing by logit is choosing by exact softmax. Models choose by float32's, in which
            different logits may have the same probability, of a tail 0: there they see a tie.
        rounding: where values are rounded if the model's dtype is bf16: "never", the "weights" at
            the end, or at all "steps" (each operation of torch on bf16 tensors rounds its result).
        epsilon: added to the sum of the chosen scores before they are divided by it.
    """

    function: str
    by_score: bool
    rounding: str
    epsilon: float = 0.0


SCORINGS = {
    "mixtral": Scoring("softmax", by_score=False, rounding="never"),
    "qwen3": Scoring("softmax", by_score=False, rounding="weights"),
    "gpt_oss": Scoring("softmax_of_chosen", by_score=False, rounding="weights"),
    "deepseek_v3": Scoring("sigmoid", by_score=True, rounding="never", epsilon=1e-20),
    "deepseek_v4": Scoring("sqrtsoftplus", by_score=True, rounding="steps", epsilon=1e-20),
    "switch": Scoring("softmax", by_score=True, rounding="steps"),
}
"""Named after the family that has it first. `switch` chooses by probabilities that are rounded to
the model's dtype, as its argmax does, so that near ties go to the lower id."""


@dataclass(frozen=True)
class Gating:
    """A model's way from logits to experts.

    Attributes:
        scoring: key of `SCORINGS`.
        top_k: experts of a token.
        renormalise: the weights of a token sum to `scaling`; a softmax of the chosen always does.
        scaling: factor of the weights.
        groups: the experts are that many groups of neighbours, each with the sum of its two largest
            values as its score. 1 for no groups.
        kept_groups: of the groups with the largest scores; experts of others are not chosen.
    """

    scoring: str
    top_k: int
    renormalise: bool = False
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1

    def check(self, experts: int) -> None:
        """Raise ValueError where this cannot be done with so many experts."""
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring is {self.scoring!r}, must be one of {list(SCORINGS)}")
        if not 1 <= experts <= MOST_EXPERTS:
            raise ValueError(f"logits are of {experts} experts, must be of 1 to {MOST_EXPERTS}")
        if not 1 <= self.top_k <= min(experts, MOST_CHOSEN):
            raise ValueError(
                f"top_k is {self.top_k}, must be 1 to {min(experts, MOST_CHOSEN)} "
                f"({experts} experts)"
            )
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling}, must be finite")
        if not 1 <= self.groups <= MOST_GROUPS or experts % self.groups:
            raise ValueError(
                f"groups is {self.groups}, must be 1 to {MOST_GROUPS} and divide {experts} experts"
            )
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"kept_groups is {self.kept_groups}, must be 1 to {self.groups}")
        size = experts // self.groups
        if self.groups > 1 and (size < 2 or self.kept_groups * size < self.top_k):
            raise ValueError(
                f"groups is {self.groups}: {self.kept_groups} groups of {size} experts must have "
                f"two experts each and {self.top_k} in all"
            )
