"""Assisted generation of models whose experts are ours: the same tokens, and drafts that a gate
stops. Clocks here only count."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)

from hybrid_moe.integrations.transformers import gated_drafts as drafts
from hybrid_moe.integrations.transformers.draft_model import load_draft
from hybrid_moe.integrations.transformers.gated_drafts import (
    DraftCounts,
    DraftRecord,
    GatedDrafts,
    draft_counts,
)
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload
from hybrid_moe.integrations.transformers.serving.answers import FROM_PROMPT, Answerer
from hybrid_moe.integrations.transformers.step_ratio import dense_nbytes, step_seconds
from hybrid_moe.schedule.measured_gate import FIRST_MEASURED, MeasuredGate
from tests.hybrid_moe.tiny_models import build

TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"
TEXT = "Python functions return values. Python functions return values. Python functions"
TOKENS = 40


class Clock:
    """Seconds that pass between two looks, one of each; the last one from then on."""

    def __init__(self, *steps: float) -> None:
        self.steps, self.now, self.looks = list(steps), 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks % 2 == 0:  # the end of a step
            self.now += self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        return self.now


@pytest.fixture(scope="module")
def model() -> Any:
    return from_pretrained(TINY, "MXFP4", threads=1, progress=False).eval()


@pytest.fixture(scope="module")
def draft(model: Any) -> Any:
    """Its first layer alone; the packed weights are shared."""
    made = copy.deepcopy(model)
    made.model.layers = made.model.layers[:1]
    made.config.num_hidden_layers = 1
    made.generation_config.num_assistant_tokens = 4
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    found: torch.Tensor = tokenizer(TEXT, return_tensors="pt").input_ids
    return found


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have measured; and every step takes one second, drafts nothing."""
    monkeypatch.setattr(drafts, "_RECORDS", type(drafts._RECORDS)())
    clock = Clock(1.0)
    monkeypatch.setattr(GatedDrafts.__init__, "__defaults__", (clock,))


def generate(model: Any, ids: torch.Tensor, **how: Any) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **how
        )
    return [int(token) for token in out[0, ids.shape[1] :]]


def likeliest(model: Any, ids: torch.Tensor, tokens: list[int]) -> bool:
    """Whether each token has the largest logit behind those before it, in one pass without a cache,
    or one that is as large but for five roundings of BF16: steps of several tokens round unlike
    those of one."""
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    with torch.inference_mode():
        scores = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].float()
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((scores.max(1).values - chosen <= 0.019 * scores.abs().max()).all())


@pytest.mark.parametrize("kind", ["draft", "prompt"])
def test_the_tokens_are_those_without_drafts(
    model: Any, draft: Any, ids: torch.Tensor, kind: str
) -> None:
    how = {"assistant_model": draft} if kind == "draft" else {"prompt_lookup_num_tokens": 4}
    plain, helped = generate(model, ids), generate(model, ids, **how)
    same = next(
        (n for n, pair in enumerate(zip(plain, helped, strict=True)) if len({*pair}) > 1), TOKENS
    )
    assert likeliest(model, ids, helped) and (same == TOKENS or likeliest(model, ids, plain))
    counts = draft_counts(model, how.get("assistant_model"))
    # the first token comes with the prompt, the others from steps
    assert counts.steps + counts.accepted == TOKENS - 1
    assert 0 < counts.accepted <= counts.drafted


def test_what_drafts_have_measured_stays_for_the_next_answer(
    model: Any, draft: Any, ids: torch.Tensor
) -> None:
    generate(model, ids, assistant_model=draft)
    (record,) = drafts._RECORDS[model].values()
    before = draft_counts(model, draft)
    generate(model, ids, assistant_model=draft)
    assert list(drafts._RECORDS[model].values()) == [record]
    since = draft_counts(model, draft) - before
    assert since.steps + since.accepted == TOKENS - 1
    assert draft_counts(model) == DraftCounts()
    draft.generation_config.num_assistant_tokens = 3
    generate(model, ids, assistant_model=draft)
    draft.generation_config.num_assistant_tokens = 4
    (other,) = drafts._RECORDS[model].values()
    assert other is not record and other.gate.max_draft == 3


class Wrong(CandidateGenerator):  # type: ignore[misc]
    """An adversary: no token that it drafts is right."""

    def __init__(self, model: Any, wanted: list[int], prompt: int) -> None:
        self.assistant_model, self.wanted, self.prompt = model, wanted, prompt
        self.num_assistant_tokens = 4
        self.assistant_kwargs: dict[str, Any] = {}
        self.asked: list[tuple[int, int]] = []

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        at = input_ids.shape[1] - self.prompt
        self.asked.append((at, self.num_assistant_tokens))
        wrong = [(token + 1) % 3000 for token in self.wanted[at : at + self.num_assistant_tokens]]
        return torch.cat([input_ids, torch.tensor([wrong])], dim=1), None


def test_a_gate_stops_an_adversary(
    model: Any, draft: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own account: a step of one second each, with drafts two. It may lose four steps at
    first, which four drafts take, and one hundredth of those without one."""
    plain = generate(model, ids)
    adversary = Wrong(draft, plain, ids.shape[1])
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 4)
    took = {0: 1.0, **dict.fromkeys(range(1, 5), 2.0)}
    noted: list[int] = []
    note = gate.note

    def by_fake_times(drafted: int, accepted: int, seconds: float | None) -> None:
        noted.append(drafted)
        note(drafted, accepted, None if seconds is None else took[drafted])

    monkeypatch.setattr(gate, "note", by_fake_times)
    monkeypatch.setattr(type(model), "_get_candidate_generator", lambda self, **kwargs: adversary)
    monkeypatch.setattr(drafts, "_LENGTHS", {Wrong: "num_assistant_tokens"})
    monkeypatch.setattr(drafts, "_record_of", lambda *args: DraftRecord(gate))
    assert generate(model, ids, assistant_model=draft) == plain
    assert len(noted) == TOKENS - 1 and len(adversary.asked) == sum(map(bool, noted))
    lost = sum(took[drafted] - 1 for drafted in noted)
    assert 1 <= lost <= 4 + 0.01 * noted.count(0) + 1  # and the first one, which was not predicted
    assert gate.gate is not None and gate.gate.acceptance < 0.7
    first = FIRST_MEASURED + 1
    assert adversary.asked[0][0] == first, "with the prompt and before a measurement there is none"


def test_the_draft_s_reading_of_the_prompt_is_no_step(ids: torch.Tensor) -> None:
    """Its first draft takes 100 seconds: no estimate and no account knows of them."""
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 2)
    inner = Wrong(None, list(range(100)), ids.shape[1])
    inner.assistant_kwargs = {
        "attention_mask": torch.ones_like(ids), "position_ids": ids, "token_type_ids": None
    }  # fmt: skip
    record = DraftRecord(gate)
    gated = GatedDrafts(inner, "num_assistant_tokens", record, Clock(50, 1, 1, 1, 100, 3))
    step = ids
    for _ in range(6):
        gated.get_candidates(step)
        step = torch.cat([step, step[:, :1]], dim=1)
        gated.update_candidate_strategy(step, torch.zeros(1, 3, 9), 0)
    assert gate.gate is not None
    assert gate.gate.seconds(0) == 1 and record.counts == DraftCounts(5, 4, 0)
    assert gate.gate.seconds(2) == (1 + 3) / 2
    # when it was asked first, four tokens had come behind the prompt
    assert inner.assistant_kwargs["attention_mask"].shape[1] == ids.shape[1] + 4
    assert "position_ids" not in inner.assistant_kwargs


def test_other_generators_draft_as_they_do(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace()
    monkeypatch.setattr(type(model), "_get_candidate_generator", lambda self: other)
    assert model._get_candidate_generator() is other


def test_how_much_longer_steps_are(model: Any, draft: Any) -> None:
    """A token reads k experts of each layer and the rest; more tokens the rest once."""
    times = [step_seconds(model, tokens) for tokens in (1, 2, 4, 1000)]
    assert times == sorted(times) and times[1] < 2 * times[0]
    # of H = 256: 4 heads of 64 for q and o, 2 for k and v, a router of 16, an output layer of 3072
    layer = 2 * 256 * (2 * 4 * 64 + 2 * 2 * 64 + 16)
    assert dense_nbytes(model) == pytest.approx(4 * layer + 2 * 256 * 3072, rel=0.01)
    assert dense_nbytes(draft) == pytest.approx(layer + 2 * 256 * 3072, rel=0.01)
    assert step_seconds(draft, 1) < times[0] / 2


def test_what_was_asked_for_and_did_not_come_was_wrong() -> None:
    """Looking for it has taken its time: no step without a draft is as long."""
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 2)
    lookup = PromptLookupCandidateGenerator(num_output_tokens=2, max_length=100)
    gated = GatedDrafts(lookup, "num_output_tokens", DraftRecord(gate), Clock(9, 1, 1, 1, 3))
    step = torch.arange(9)[None]
    for _ in range(5):
        candidates, _ = gated.get_candidates(step)
        assert torch.equal(candidates, step), "no token was there before"
        step = torch.cat([step, step[:, -1:] + 1], dim=1)
        gated.update_candidate_strategy(step, torch.zeros(1, 1, 9), 0)
    assert gate.gate is not None and gate.gate.acceptance < 0.7
    assert (gate.gate.seconds(0), gate.gate.seconds(2)) == (1, (1 + 3) / 2)


# Answers ----------------------------------------------------------------------------------------


def config(model: Any, tokens: int) -> Any:
    made = copy.deepcopy(model.generation_config)
    made.update(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return made


class Told:
    """A reader who has had enough after so many tokens."""

    def __init__(self, enough: int) -> None:
        self.tokens: list[int] = []
        self.enough = enough

    def __call__(self, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) == self.enough


@pytest.mark.parametrize("kind", ["draft", "prompt"])
def test_answers_with_drafts(model: Any, draft: Any, ids: torch.Tensor, kind: str) -> None:
    """Each token is told once; an answer that its reader ends has none behind that, whatever was
    drafted; and the next prompt finds in the cache what was read."""
    answerer = Answerer(model, draft if kind == "draft" else FROM_PROMPT)
    prompt, seen = ids[0].tolist(), []
    answer = answerer.answer(prompt, config(model, 40), seen.append)
    assert list(answer.tokens) == seen and len(seen) == len(answer.times) == 40
    assert likeliest(model, ids, seen) and answer.end == "length"
    assert answer.drafts is not None and answer.drafts.accepted > 0
    assert answer.drafts.steps + answer.drafts.accepted == 39
    assert list(answer.times) == sorted(answer.times) and answer.decode_speed is not None
    for length in (20, 7):
        told = Told(length)
        ended = answerer.answer(prompt, config(model, 40), told)
        assert ended.end == "stop" and list(ended.tokens) == told.tokens
        assert len(told.tokens) == length and likeliest(model, ids, told.tokens)
    longer = [*prompt, *ended.tokens, 5]
    again = answerer.answer(longer, config(model, 20))
    assert again.reused >= len(prompt) + 6 - 1 and again.drafts is not None
    assert again.drafts.drafted > 0
    assert likeliest(model, torch.tensor([longer]), list(again.tokens))
    assert "prepare_inputs_for_generation" not in vars(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_conversation_with_drafts_is_not_read_again(family: str) -> None:
    """Each answer goes on behind what the cache holds, windows of 16 tokens among it, and leaves it
    whole for the next. The draft, which is the model itself, reads what the model reads, also
    tokens that look like padding: most that it says is right (random weights route near ties)."""
    model, draft = (offload(build(family), "BF16", threads=1, progress=False) for _ in range(2))
    draft.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 3)
    drafts._RECORDS.setdefault(model, type(drafts._RECORDS)())[draft] = DraftRecord(gate)
    answerer = Answerer(model, draft)
    prompt = torch.randint(1, 120, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    prompt[40] = 0  # the padding of `config`
    for turn in range(3):
        answer = answerer.answer(prompt, config(model, 20))
        assert answer.reused == (len(prompt) - 2 if turn else 0)
        prompt = [*prompt, *answer.tokens, 5]
    counts = draft_counts(model, draft)
    assert counts.drafted / 2 < counts.accepted and counts.steps + counts.accepted == 3 * 19


# Drafts from a folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_draft_with_experts_or_without(family: str, tmp_path: Path) -> None:
    model = offload(build("qwen3_moe"), "BF16", threads=1, progress=False)
    vocabulary = model.config.vocab_size
    if family == "qwen3":
        shape = transformers.Qwen3Config(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        transformers.Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    else:
        build("qwen3_moe").save_pretrained(tmp_path)
    draft = load_draft(tmp_path, model, threads=1, progress=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = generate(model, ids)
    helped = generate(model, ids, assistant_model=draft)
    assert helped == plain or likeliest(model, ids, helped)
    counts = draft_counts(model, draft)
    assert counts.drafted and counts.steps + counts.accepted == TOKENS - 1
    if family == "qwen3_moe":  # it is the model itself
        assert counts.accepted > counts.drafted / 2


def test_a_draft_with_other_tokens_is_refused(model: Any, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="to draft for 3072: a draft needs the same tokenizer"):
        load_draft(tmp_path, model, progress=False)
