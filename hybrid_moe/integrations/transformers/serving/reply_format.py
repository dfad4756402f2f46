"""An answer's tokens as text, apart from what the model thinks and which tools it calls.

Models mark these by special tokens, each family in its own way. Transformers' `ResponseParser`
(`transformers.utils.chat_parsing`) reads the marks by a template that the tokenizer brings, or that
Transformers knows for a family.
"""

from __future__ import annotations

import logging
from typing import Any

from tokenizers.decoders import DecodeStream

logger = logging.getLogger(__name__)

HARMONY: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open": "<|channel|>analysis<|message|>",
            "close": "<|end|>",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"(?:<\|channel\|>commentary)?\s*to=functions\.(?P<name>[\w.-]+)"
            r"[^{]*<\|message\|>",
            "close": "<|call|>",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary)(?! to=)\s*<\|message\|>",
            "close": ["<|return|>", "<|end|>"],
            "content": "text",
        },
    },
}
"""gpt-oss, whose tokenizer brings none: https://cookbook.openai.com/articles/openai-harmony."""


def response_template(tokenizer: Any, model_type: str) -> dict[str, Any] | None:
    """The template that reads a model's answers; None where they are plain text.

    A family's template counts only where the prompt that the tokenizer makes has the anchor behind
    which it begins to read: else a parser would take the prompt for a part of the answer.
    """
    own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    if own is not None or not getattr(tokenizer, "chat_template", None):
        return own
    known = _of_family(model_type)
    if known is None:
        return None
    anchors = known["start_anchor"]
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates are programs of others
        logger.debug("the chat template cannot be tried: %s", error)
        return None
    fits = any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))
    return known if fits else None


def _of_family(model_type: str) -> dict[str, Any] | None:
    if model_type == "gpt_oss":
        return HARMONY
    try:
        from transformers.cli.serving import utils
    except ImportError:  # older than 5.23
        return None
    families: dict[tuple[str, ...], dict[str, Any]] = getattr(
        utils, "_RESPONSE_TEMPLATE_FALLBACKS", {}
    )
    return next((t for names, t in families.items() if model_type in names), None)


class TokenText:
    """Text of tokens as they come, whole characters only.

    Args:
        tokenizer: Transformers', a fast one.
        special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, *, special: bool) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._stream = DecodeStream(skip_special_tokens=not special)

    def feed(self, token: int) -> str:
        """What can be said now that `token` has come."""
        return self._stream.step(self._tokenizer, token) or ""


class ReplyText:
    """An answer's text in pieces, each with whether it is thought rather than said.

    Args:
        tokenizer: Transformers', a fast one.
        template: see `response_template`.
        prompt: the prompt's tokens.
    """

    def __init__(self, tokenizer: Any, template: dict[str, Any] | None, prompt: list[int]) -> None:
        self._words = TokenText(tokenizer, special=template is not None)
        self._parser: Any = None
        if template is not None:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(template, prefix=tokenizer.decode(prompt))

    def feed(self, token: int) -> list[tuple[str, bool]]:
        """What `token` adds."""
        text = self._words.feed(token)
        if self._parser is None:
            return [(text, False)] if text else []
        return _pieces(self._parser.feed(text)) if text else []

    def end(self) -> list[tuple[str, bool]]:
        """What was held back for a mark that did not come."""
        if self._parser is None:
            return []
        try:
            return _pieces(self._parser.finalize()[1])
        except ValueError as error:  # cut off within a tool call
            logger.debug("an answer ends within a mark: %s", error)
            return []


def _pieces(events: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [
        (event["text"], event["field"] != "content")
        for event in events
        if event["type"] == "region_chunk" and event.get("text")
    ]
