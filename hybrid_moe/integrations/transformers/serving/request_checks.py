"""What a request to the server may ask for; what is not understood is refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from hybrid_moe.integrations.transformers.serving.stop_strings import StopStrings

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto",),
    "functions": ([],),
    "function_call": ("auto",),
    "audio": (),
    "web_search_options": (),
    "generation_config": (),
    "background": (False,),
    "previous_response_id": (),
    "prompt": (),
    "include": ([],),
    "text": ({"format": {"type": "text"}},),
    "truncation": ("disabled",),
}
"""Fields that Transformers' handlers leave unread -> values that ask for nothing. (`prompt` of the
Responses API: `check_request` knows which of the two is meant.)"""

RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "frequency_penalty": (-0.99, 2),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
    "max_output_tokens": (1, 2**31),
}
"""Field -> its least and its largest value."""

INTEGERS = {"seed", "max_tokens", "max_completion_tokens", "max_output_tokens"}


def check_request(body: Mapping[str, Any]) -> None:
    """Raise `HTTPException` 400 for a request that would not be answered as it asks."""
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if name == "prompt" and "input" not in body:
            continue
        if value is not None and value not in neutral:
            raise HTTPException(400, f"{name}={value!r} is not supported here: leave it out")
    for name, (least, most) in RANGES.items():
        value = body.get(name)
        kinds = (int,) if name in INTEGERS else (int, float)
        if value is None or (
            isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        ):
            continue
        kind = "an integer" if name in INTEGERS else "a number"
        raise HTTPException(400, f"{name}={value!r} must be {kind} from {least:g} to {most:g}")
    if not isinstance(body.get("model"), str):
        raise HTTPException(400, f"model={body.get('model')!r} must be a name")
    _stops(body)
    messages = body.get("messages")
    if messages is not None and not _are_messages(messages):
        raise HTTPException(
            400, "messages must be a list of objects, one at least, each with a role and a content"
        )


def set_effort(body: dict[str, Any]) -> None:
    """Make the effort of reasoning, for which both chat interfaces have a field, an argument of the
    chat template in `body`; gpt-oss's knows it."""
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort")
    if effort is None and isinstance(reasoning, dict):
        effort = reasoning.get("effort")
    if effort is not None:
        body["chat_template_kwargs"] = {
            "reasoning_effort": effort,
            **(body.get("chat_template_kwargs") or {}),
        }


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    strings = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise HTTPException(400, f"stop={stop!r} must be a string or a list of strings, none empty")
    return tuple(strings)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), (str, list, type(None)))
            for m in value
        )
    )


@dataclass
class Served:
    """What a request asks for beside what a `GenerationConfig` says, and how its answer ended.

    Attributes:
        max_tokens: of the answer; None for as many as the context has room for.
        samples: whether tokens are drawn; None for what the model's authors set.
        seed: of the drawing.
        stop: strings that end the answer.
        end: see `Answer.end`; empty before it has ended.
    """

    max_tokens: int | None
    samples: bool | None
    seed: int | None
    stop: tuple[str, ...]
    end: str = ""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Served:
        """What a checked request asks for."""
        lengths = (
            body.get(n) for n in ("max_completion_tokens", "max_output_tokens", "max_tokens")
        )
        temperature = body.get("temperature")
        samples = None if temperature is None else temperature > 0
        return cls(
            max_tokens=next((n for n in lengths if n is not None), None),
            samples=samples,
            seed=body.get("seed"),
            stop=_stops(body),
        )

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        strings = StopStrings(self.stop)
        return strings.feed(text) + strings.rest()
