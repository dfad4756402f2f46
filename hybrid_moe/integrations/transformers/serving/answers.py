"""Answers of a model, one at a time, with the keys and values of what it has read kept in between.

A conversation's next prompt begins with what the model has read already, so only what follows is
computed. Between two prompts that differ the common beginning is kept, where the cache can be cut
there: layers with recurrent states cannot, nor windows that had moved past that place before the
last answer began.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from hybrid_moe.integrations.transformers.gated_drafts import DraftCounts, draft_counts
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.serving.continued_cache import behind_cache
from hybrid_moe.integrations.transformers.step.growing_cache import growing_cache

logger = logging.getLogger(__name__)

FROM_PROMPT = "prompt"
"""The draft that is what followed the last words where they were before."""

LOOKED_UP = 10
"""Tokens that such a draft has at most: Transformers' own default."""

LEAST_REUSED = 32
"""Tokens: below, reading them again costs less than one token of the answer does, and an answer
does not depend on what was asked before it."""


class CancelledError(Exception):
    """The answer was cancelled before its first token."""


@dataclass(frozen=True)
class Answer:
    """What was generated, and how fast.

    Attributes:
        tokens: generated, an end-of-text token included.
        prompt: tokens of the prompt.
        reused: tokens of the prompt that were in the cache.
        times: seconds since the start at which each token was there; the first ends the prefill.
        end: why it ended: "stop" (the model or `on_token` said so), "length", "cancelled".
        drafts: what they have done; None where nothing drafts.
    """

    tokens: tuple[int, ...]
    prompt: int
    reused: int
    times: tuple[float, ...]
    end: str
    drafts: DraftCounts | None = None

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt per second, without those in the cache; to the first token."""
        return (self.prompt - self.reused) / self.times[0]

    @property
    def decode_speed(self) -> float | None:
        """Tokens per second after the first one; None where no other step gave one."""
        if self.times[-1] == self.times[0]:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Answerer:
    """Generates answers, one at a time, and keeps the KV cache of the last one.

    Args:
        model: a Transformers causal language model.
        draft: drafts tokens for it: another model, see `draft_model.load_draft`, or `FROM_PROMPT`.

    Not for several threads at once.
    """

    def __init__(self, model: Any, draft: Any = None) -> None:
        self.model = model
        self._draft = draft
        self._cache: Any = None
        self._cached: list[int] = []  # tokens whose keys and values it holds

    def answer(
        self,
        prompt: Sequence[int],
        config: Any,
        on_token: Callable[[int], bool | None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Answer:
        """Generate.

        Args:
            prompt: its tokens, one at least.
            config: a `GenerationConfig` with `max_new_tokens`.
            on_token: gets each token as soon as it is there; True ends the answer.
            cancelled: ends the answer once it is set, within a layer of the prefill or after the
                token under way.

        Raises:
            CancelledError: it was set before the first token.
        """
        cancelled = cancelled or threading.Event()
        if cancelled.is_set():  # while it waited: the cache stays
            raise CancelledError
        cache, reused = self._reuse(prompt)
        self._cache, self._cached = None, []  # whatever happens now, it is no longer as it was
        if cache is None:
            cache = _new_cache(self.model)
        watch = _Watch(len(prompt), on_token, cancelled, cache)
        config = copy.copy(config)
        config.return_dict_in_generate = True  # with the cache
        config.cache_implementation = None
        ids = torch.tensor([list(prompt)], device=self.model.device)
        kept = {} if cache is None else {"past_key_values": cache}
        del cache
        before = self._counts()
        if self._draft == FROM_PROMPT:
            config.prompt_lookup_num_tokens = LOOKED_UP
        continued: AbstractContextManager[None] = nullcontext()
        if self._draft is not None and reused:
            continued = behind_cache(self.model, reused)
        with torch.inference_mode(), _interruptible(self.model, cancelled), continued:
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=[watch],
                assistant_model=self._drafting_model,
                **kept,
            )
        read = found.sequences[0].tolist()
        self._keep(getattr(found, "past_key_values", None), read)
        tokens = read[: len(prompt) + len(watch.times)]  # a draft may go on behind the end
        end = "length" if len(watch.times) >= config.max_new_tokens else "stop"
        if cancelled.is_set():
            end = "cancelled"
        elif watch.stopped or _is_end(tokens[-1], config):
            end = "stop"
        answered, drafts = tuple(tokens[len(prompt) :]), self._counts() - before
        return Answer(
            answered, len(prompt), reused, tuple(watch.times), end,
            None if self._draft is None else drafts,
        )  # fmt: skip

    @property
    def _drafting_model(self) -> Any:
        return None if self._draft == FROM_PROMPT else self._draft

    def _counts(self) -> DraftCounts:
        """What drafts have done so far."""
        return draft_counts(self.model, self._drafting_model)

    def forget(self) -> None:
        """Free the cache."""
        self._cache, self._cached = None, []

    def _reuse(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """The cache cut to what `prompt` begins with, and how many tokens that is; a model needs
        at least one more token to compute."""
        common = 0
        for mine, asked in zip(self._cached, prompt[:-1], strict=False):
            if mine != asked:
                break
            common += 1
        if common < LEAST_REUSED or not _cut(self._cache, len(self._cached) - common):
            return None, 0
        return self._cache, common

    def _keep(self, cache: Any, tokens: list[int]) -> None:
        """Keep what `generate` returns; the last token has not been read by the model."""
        length = cache.get_seq_length() if cache is not None else 0
        if 0 < length <= len(tokens):
            self._cache, self._cached = cache, tokens[:length]


class _Watch:
    """A stopping criterion of `generate`, which calls it with all tokens after each step.

    Attributes:
        times: seconds since the start at which each token of the answer was there.
        stopped: `on_token` has ended the answer with the last of them.
    """

    def __init__(
        self,
        prompt: int,
        on_token: Callable[[int], bool | None] | None,
        cancelled: threading.Event,
        cache: Any,
    ) -> None:
        self._on_token = on_token
        self._cancelled = cancelled
        self._cache, self._prompt = cache, prompt
        self._start = perf_counter()
        self.times: list[float] = []
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        now = perf_counter() - self._start
        if not self.times:
            _record(self._cache)
        for token in input_ids[0, self._prompt + len(self.times) :].tolist():
            self.times.append(now)
            if self._on_token is not None and self._on_token(token):
                self.stopped = True
            if self.stopped or self._cancelled.is_set():
                break
        ended = self.stopped or self._cancelled.is_set()
        return torch.tensor([ended], device=input_ids.device)


def _is_end(token: int, config: Any) -> bool:
    ends = config.eos_token_id
    return token in (ends if isinstance(ends, (list, tuple)) else [ends])


def _new_cache(model: Any) -> Any:
    """An empty cache; None for a model that makes its own."""
    if not model._supports_default_dynamic_cache():
        return None
    return growing_cache(model.config.get_text_config(decoder=True))


def _windows(cache: Any) -> list[Any]:
    """The layers of a cache that keep a sliding window only."""
    layers = getattr(cache, "layers", None) or ()
    return [layer for layer in layers if getattr(layer, "is_sliding", False)]


def _record(cache: Any) -> None:
    """Let windows keep what leaves them from now on: the answer may be cut off again, as thoughts
    leave a conversation, and the window must then be as it was before them."""
    for layer in _windows(cache):
        layer.activate_past_recording()


def _reaches(layer: Any, tokens: int) -> bool:
    """Whether a window is still whole without its last `tokens`."""
    kept = layer.keys.shape[-2] - tokens
    return bool(kept >= min(layer.sliding_window - 1, layer.get_seq_length() - tokens))


def _cut(cache: Any, tokens: int) -> bool:
    """Remove the last `tokens` from the cache; False where it cannot, and then it is worthless."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(getattr(layer, "is_croppable", False) for layer in layers):
        return cache is not None and tokens == 0
    if not all(_reaches(layer, tokens) for layer in _windows(cache)):
        return False
    before = cache.get_seq_length()
    try:
        cache.crop(-tokens)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        logger.debug("the KV cache cannot be cut, the whole prompt is read again: %s", error)
        return False
    return bool(cache.get_seq_length() == before - tokens)


@contextmanager
def _interruptible(model: Any, cancelled: threading.Event) -> Iterator[None]:
    """Raise `CancelledError` from the next layer with experts once `cancelled` is set. Only in the
    first pass, the prefill, which may take minutes: a token ends soon by itself, and its cache
    stays whole."""
    hooks: list[Any] = []
    passes = 0

    def check(module: Any, arguments: Any) -> None:
        if cancelled.is_set():
            raise CancelledError

    def count(module: Any, arguments: Any, result: Any) -> None:
        nonlocal passes
        passes += 1
        _remove(hooks)

    hooks += [
        module.register_forward_pre_hook(check)
        for module in model.modules()
        if isinstance(module, HybridExperts)
    ]
    hooks.append(model.register_forward_hook(count))
    try:
        yield
    finally:
        _remove(hooks)


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
