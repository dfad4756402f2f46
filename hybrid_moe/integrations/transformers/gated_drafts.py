"""Assisted generation whose drafts are as long as pays: `generate(assistant_model=...)`, and
`prompt_lookup_num_tokens=...`, of models whose experts are ours.

Transformers asks a `CandidateGenerator` for tokens before each step, and tells it afterwards how
many of them were right. Here a generator of its own is asked for as many as the gate allows
(`schedule.draft_gate`), or not at all. Tokens are what they are without drafts: the model checks
each one.

The draft reads the prompt too, in the step of an answer's first draft: how long that takes says
nothing of other steps, and is not on the gate's account.
"""

from __future__ import annotations

import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EarlyExitCandidateGenerator,
    PromptLookupCandidateGenerator,
)

from hybrid_moe.integrations.transformers.step_ratio import step_seconds
from hybrid_moe.schedule.measured_gate import MeasuredGate

_LENGTHS = {
    AssistedCandidateGenerator: "num_assistant_tokens",
    EarlyExitCandidateGenerator: "num_assistant_tokens",
    PromptLookupCandidateGenerator: "num_output_tokens",
}
"""Generators that draft tokens of the model's own vocabulary one after the other -> their attribute
that says how many. Others (heads that draft several at once, other tokenizers) draft as they do."""


@dataclass(frozen=True)
class DraftCounts:
    """What drafts have done: steps of the model, tokens drafted in them, and those that were
    right."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, more: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.steps + more.steps, self.drafted + more.drafted, self.accepted + more.accepted
        )

    def __sub__(self, before: DraftCounts) -> DraftCounts:
        """What has come since."""
        return DraftCounts(
            self.steps - before.steps,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
        )


@dataclass
class DraftRecord:
    """What is known of some drafts from one answer to the next: what a step takes, and the tokens
    of all."""

    gate: MeasuredGate
    counts: DraftCounts = field(default_factory=DraftCounts)


_RECORDS: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, DraftRecord]] = (
    weakref.WeakKeyDictionary()
)
"""Model -> what drafts for it; itself, where the prompt does."""


class GatedDrafts(CandidateGenerator):  # type: ignore[misc]
    """Another generator's candidates, as many as the gate allows.

    Args:
        drafts: the other one.
        length: name of its attribute that says how many tokens it drafts.
        record: of these drafts.
        clock: seconds since any time.
    """

    def __init__(
        self,
        drafts: Any,
        length: str,
        record: DraftRecord,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafts, self._length, self._record, self._clock = drafts, length, record, clock
        self._began: float | None = None
        self._asked = self._drafted = 0
        self._has_read = type(drafts) is PromptLookupCandidateGenerator
        self._prompt = True

    def get_candidates(
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens so far with a draft behind them, and its logits; none with the prompt."""
        self._began, self._drafted = self._clock(), 0
        self._asked = 0 if self._prompt else self._record.gate.length
        if not self._asked:
            return input_ids, None
        if not self._has_read:
            _lengthen(self._drafts.assistant_kwargs, input_ids)
        setattr(self._drafts, self._length, self._asked)
        candidates, logits = self._drafts.get_candidates(input_ids, **kwargs)
        self._drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, logits

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Take in the step that `get_candidates` began."""
        assert self._began is not None
        seconds: float | None = self._clock() - self._began
        if self._prompt:
            self._prompt = False
            return
        if self._asked:
            self._drafts.update_candidate_strategy(input_ids, scores, num_matches)
            if not self._has_read:
                self._has_read, seconds = True, None
        self._record.gate.note(self._asked, int(num_matches), seconds)
        self._record.counts += DraftCounts(1, self._drafted, int(num_matches))


def _lengthen(inputs: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Inputs of a draft that reads more than the prompt at first, with which Transformers takes it
    to begin: they are those of the prompt. A mask of ones is left out there, and the draft's
    `generate` would take tokens for padding that look like it."""
    inputs.pop("position_ids", None)  # `generate` makes them of the mask
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    for name in ("attention_mask", "token_type_ids"):
        given = inputs.get(name)
        if given is not None:
            more = given[:, -1:].expand(-1, input_ids.shape[1] - given.shape[1])
            inputs[name] = torch.cat([given, more], dim=1)


def gate_drafts(model: Any) -> None:
    """Let `model.generate` draft no more than pays. Idempotent; models that cannot generate are
    left alone."""
    if hasattr(model, "_get_candidate_generator"):
        model._get_candidate_generator = types.MethodType(_get_candidate_generator, model)


def draft_counts(model: Any, draft: Any = None) -> DraftCounts:
    """Of all answers of a model so far.

    Args:
        draft: the model that drafts; None for drafts from the prompt.
    """
    record = _RECORDS.get(model, {}).get(model if draft is None else draft)
    return DraftCounts() if record is None else record.counts


def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What `generate` calls once for an answer."""
    drafts = type(self)._get_candidate_generator(self, *args, **kwargs)
    name = _LENGTHS.get(type(drafts))
    if name is None:
        return drafts
    drafter = getattr(drafts, "assistant_model", self)
    return GatedDrafts(drafts, name, _record_of(self, drafter, int(getattr(drafts, name))))


def _record_of(model: Any, drafter: Any, longest: int) -> DraftRecord:
    records = _RECORDS.setdefault(model, weakref.WeakKeyDictionary())
    record = records.get(drafter)
    if record is None or record.gate.max_draft != longest:
        steps = [step_seconds(model, tokens) for tokens in range(1, longest + 2)]
        draft = 0.0 if drafter is model else step_seconds(drafter, 1)
        ratios = [seconds / steps[0] for seconds in steps]
        gate = MeasuredGate(lambda tokens: ratios[tokens - 1], draft / steps[0], longest)
        counts = DraftCounts() if record is None else record.counts
        record = records[drafter] = DraftRecord(gate, counts)
    return record
