"""What was said and what was thought, told apart."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybrid_moe.integrations.transformers.serving.reply_format import (
    HARMONY,
    ReplyText,
    response_template,
)

pytest.importorskip("transformers.utils.chat_parsing", reason="Transformers 5.23's")

MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>",
         "<|constrain|>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"]  # fmt: skip
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>"
    "{{ '\\n' }}{% endfor %}<|im_start|>assistant{{ '\\n' }}"
)
GPT_OSS = "{% for m in messages %}<|start|>user<|message|>{{ m['content'] }}<|end|>{% endfor %}<|start|>assistant"  # noqa: E501


def tokenizer(template: str | None) -> Any:
    """Of single characters and the marks."""
    vocabulary = ["<unk>", "\n", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(MARKS)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    fast.chat_template = template
    return fast


def read(made: Any, template: Any, answer: str) -> list[tuple[str, bool]]:
    """Pieces of the same kind put together."""
    prompt = made.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    reply = ReplyText(made, template, prompt)
    pieces = [p for token in made(answer)["input_ids"] for p in reply.feed(token)] + reply.end()
    merged: list[tuple[str, bool]] = []
    for text, thought in pieces:
        if merged and merged[-1][1] == thought:
            merged[-1] = (merged[-1][0] + text, thought)
        else:
            merged.append((text, thought))
    return merged


def test_gpt_oss() -> None:
    made = tokenizer(GPT_OSS)
    template = response_template(made, "gpt_oss")
    assert template is HARMONY
    answer = (
        "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Hello <3 there<|return|>"
    )
    assert read(made, template, answer) == [("They greet.", True), ("Hello <3 there", False)]


@pytest.mark.parametrize(
    "head",
    ["<|channel|>commentary to=functions.look <|constrain|>json",
     " to=functions.look<|channel|>commentary json"],
)  # fmt: skip
def test_gpt_oss_calls_tools(head: str) -> None:
    from transformers.utils.chat_parsing import ResponseParser

    parser = ResponseParser(HARMONY, prefix="<|start|>assistant")
    parser.feed(
        f"<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{head}"
        '<|message|>{"at": {"x": 1}}<|call|>'
    )
    message, _ = parser.finalize()
    call = {"name": "look", "arguments": {"at": {"x": 1}}}
    assert message["tool_calls"] == [{"type": "function", "function": call}]
    assert message["reasoning_content"] == "Look."


def test_qwen_thinks() -> None:
    made = tokenizer(QWEN)
    template = response_template(made, "qwen3_moe")
    pieces = read(made, template, "<think>Hm.</think>Hello<|im_end|>")
    assert pieces == [("Hm.", True), ("Hello", False)]


@pytest.mark.parametrize(
    ("template", "family"),
    [(PLAIN, "qwen3_moe"), (PLAIN, "gpt_oss"), (QWEN, "mixtral"), (None, "qwen3_moe")],
)
def test_a_template_that_does_not_fit_is_not_used(template: str | None, family: str) -> None:
    """Else the prompt would be read as the beginning of the answer."""
    made = tokenizer(template)
    assert response_template(made, family) is None
    if template is not None:
        assert read(made, None, "Hello<|im_end|>") == [("Hello", False)]


def test_a_tokenizer_that_knows_better() -> None:
    made = tokenizer(PLAIN)
    made.response_template = HARMONY
    assert response_template(made, "qwen3_moe") is HARMONY
