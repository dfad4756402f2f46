"""What has been said in a chat, and the prompt that it makes."""

from __future__ import annotations

from typing import Any


class ContextFullError(ValueError):
    """A message does not fit into the context, even alone."""


class Conversation:
    """The turns of a chat.

    With a chat template a prompt is what the template makes of the messages. Without one the text
    so far is continued as it is, what was typed and what was answered.

    Attributes:
        has_template: whether the tokenizer has one.
        context: tokens of a prompt and its answer.

    Args:
        tokenizer: Transformers'.
        system: instructions in front, which stay; empty for none.
    """

    def __init__(self, tokenizer: Any, system: str, context: int) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self.context = context
        self._messages: list[dict[str, str]] = []
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def ask(self, text: str, room: int) -> tuple[list[int], int]:
        """Add a question.

        Args:
            room: tokens that an answer should have at the least.

        Returns:
            The prompt's tokens, and how many of the oldest messages were dropped to leave `room`.

        Raises:
            ContextFullError: the question does not fit alone. It is not added, nothing is dropped.
            ValueError: the template refuses these messages. Likewise.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        dropped = 0
        while len(prompt := self._prompt(messages[dropped:])) + room > self.context:
            rest = messages[dropped + 1 :]
            step = next((i for i, m in enumerate(rest, 1) if m["role"] == "user"), None)
            if step is None:
                raise ContextFullError(
                    f"this message makes a prompt of {len(prompt)} tokens, too long for the "
                    f"context of {self.context} tokens with {room} for the answer: it was not sent"
                )
            dropped += step
        self._messages = messages[dropped:]
        return prompt, dropped

    def answered(self, text: str) -> None:
        """Add the answer to what was asked last."""
        self._messages.append({"role": "assistant", "content": text})

    def unask(self) -> None:
        """Take back what was asked last, which has no answer."""
        self._messages.pop()

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self._messages.clear()

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.has_template:
            text = self._system + "".join(message["content"] for message in messages)
            tokens: list[int] = self._tokenizer(text)["input_ids"]
            return tokens
        if self._system:
            messages = [{"role": "system", "content": self._system}, *messages]
        from jinja2 import TemplateError

        try:
            tokens = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this: {error}") from error
        return tokens
