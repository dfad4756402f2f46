"""`hybrid-moe chat`: what a conversation's prompt is, and the terminal."""

from __future__ import annotations

import importlib
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_moe.cli.conversation import ContextFullError, Conversation
from hybrid_moe.integrations.transformers.serving.answers import Answer, Answerer
from tests.hybrid_moe.command import run, write_model
from tests.hybrid_moe.served_model import write_chat_model

chat_module = importlib.import_module("hybrid_moe.cli.chat")  # the command has the same name

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template; a token is a character."""
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(plain: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(plain)


@pytest.fixture
def talk(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a conversation; its prompts as text."""

    def make(context: int, system: str = "", template: str | None = TEMPLATE) -> Conversation:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return Conversation(tokenizer, system, context)

    return make


def text_of(tokenizer: Any, prompt: list[int]) -> str:
    return str(tokenizer.decode(prompt))


def test_turns_go_through_the_template(talk: Any, tokenizer: Any) -> None:
    conversation = talk(100, "Be kind.")
    assert text_of(tokenizer, conversation.ask("Hi", 9)[0]) == "<s>Be kind.<u>Hi<a>"
    conversation.answered("Hello")
    prompt, dropped = conversation.ask("Who?", 9)
    assert text_of(tokenizer, prompt) == "<s>Be kind.<u>Hi<a>Hello<u>Who?<a>" and dropped == 0
    conversation.unask()
    assert text_of(tokenizer, conversation.ask("Why?", 9)[0]).endswith("Hello<u>Why?<a>")
    conversation.reset()
    assert text_of(tokenizer, conversation.ask("Hi", 9)[0]) == "<s>Be kind.<u>Hi<a>"


def test_without_a_template_the_text_goes_on(talk: Any, tokenizer: Any) -> None:
    conversation = talk(100, "Once ", template=None)
    assert not conversation.has_template
    assert text_of(tokenizer, conversation.ask("upon", 9)[0]) == "Once upon"
    conversation.answered(" a time")
    assert text_of(tokenizer, conversation.ask(" there", 9)[0]) == "Once upon a time there"


def test_a_full_context_drops_the_oldest_turns(talk: Any, tokenizer: Any) -> None:
    """Whole turns, and not the system prompt; no more of them than needed."""
    conversation = talk(34, "S")
    for question, answer in (("one", "1111"), ("two", "2222")):
        conversation.ask(question, 4)
        conversation.answered(answer)
    prompt, dropped = conversation.ask("three", 4)
    assert text_of(tokenizer, prompt) == "<s>S<u>two<a>2222<u>three<a>" and dropped == 2
    assert len(prompt) + 4 <= 34 < len(prompt) + 4 + len("<u>one<a>1111")
    with pytest.raises(ContextFullError, match=r"prompt of 36 tokens.*context of 34 tokens"):
        conversation.ask("x" * 26, 4)
    conversation.unask()  # what was refused was not added
    assert text_of(tokenizer, conversation.ask("4", 4)[0]) == "<s>S<u>two<a>2222<u>4<a>"


def test_a_refusal_of_the_template_is_a_sentence(talk: Any) -> None:
    conversation = talk(99, template="{{ raise_exception('no users') }}")
    with pytest.raises(ValueError, match="chat template refuses this: no users"):
        conversation.ask("Hi", 4)


def test_each_line_of_a_pipe_is_a_message(tiny: Path) -> None:
    lines = "Emma was\n\n/help\n/wild\nand then\n/reset\nEmma was\n/exit\nno more"
    result = run("chat", "--model", tiny, "--threads", 1, "--max-new-tokens", 8, "--system", "Oh",
                 input=lines)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(.+)\n.+\n\1\n", result.stdout, re.S)  # forgotten: the same again
    assert result.stderr.count("context ") == 4 and "there is no command /wild" in result.stderr
    assert "/reset  forget the conversation" in result.stderr
    assert result.stderr.count("cut off: --max-new-tokens 8") == 3
    assert "no chat template" not in result.stderr


def test_drafts_from_what_was_said(tiny: Path) -> None:
    """The answer is what it is without them; a summary tells what they have done."""
    words = ("chat", "--model", tiny, "--threads", 1, "--max-new-tokens", 40, "--temperature", 0)
    plain = run(*words, input="Emma was Emma was\n")
    result = run(*words, "--draft", "prompt", input="Emma was Emma was\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout
    assert re.search(r"tok/s, \d+ of \d+ drafted ones right; context", result.stderr)
    assert "drafted" not in plain.stderr


def test_answers_say_how_many_experts_were_in_slots(tiny: Path) -> None:
    """Of each answer alone."""
    result = run("chat", "--model", tiny, "--threads", 1, "--max-new-tokens", 3, "--gpu-experts",
                 "50%", "--gpu-backend", "torch", input="Emma\nwas")  # fmt: skip
    assert result.exit_code == 0, result.output
    pairs = re.findall(r"of (\d+) calls; by layer .* at most\]", result.stderr)
    prompts = re.findall(r"prefill (\d+) tokens", result.stderr)
    assert len(pairs) == 2
    # four layers, four experts a token; the last token of an answer is not read
    assert [int(n) for n in pairs] == [4 * 4 * (int(prompt) + 2) for prompt in prompts]


def test_what_happens_at_the_end_of_the_context(plain: Path) -> None:
    lines = ["Hello", "there" * 6, "x" * 60]
    result = run("chat", "--model", plain, "--threads", 1, "--context", 40, "--temperature", 0,
                 input="\n".join(lines))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the tokenizer has no chat template: the model continues the text" in result.stderr
    assert "context 40 of 40 tokens; cut off: the context is full" in result.stderr
    assert "the context of 40 tokens is full: the 2 oldest messages are forgotten" in result.stderr
    assert "this message makes a prompt of 60 tokens, too long for the context" in result.stderr
    refused = run("chat", "--model", plain, "--context", 1000, input="x")
    assert refused.exit_code == 2 and "the model was made for 128 tokens" in refused.stderr


class Terminal:
    """`chat` on a terminal of its own."""

    def __init__(self, model: Path) -> None:
        self.side, other = pty.openpty()
        program = "from hybrid_moe.cli import main; main()"
        words = (
            "chat",
            "--model",
            str(model),
            "--threads",
            "1",
            "--temperature",
            "0",
            "--max-new-tokens",
            "300",
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
            preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0),  # its controlling terminal
        )  # fmt: skip
        os.close(other)
        self.text = ""

    def read_until(self, pattern: str) -> str:
        """What is shown up to a pattern, and it."""
        while not (found := re.search(pattern, self.text)):
            try:
                self.text += os.read(self.side, 4096).decode()
            except OSError:  # the other side is closed
                raise AssertionError(f"no {pattern} in {self.text!r}") from None
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())


CTRL_C = "\x03"


def test_ctrl_c_stops_an_answer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said stays, if something was; the next message is answered."""
    messages = iter(["Emma was", "very", EOFError])
    pressed_at = iter(["answer", "prompt"])
    taken: list[list[int]] = []
    real = Answerer.answer

    def enter(prompt: str) -> str:
        if isinstance(message := next(messages), str):
            return message
        raise message

    def answer(self: Any, prompt: list[int], config: Any, on_token: Any, cancelled: Any) -> Answer:
        taken.append(prompt)
        when = next(pressed_at)
        if when == "prompt":
            signal.raise_signal(signal.SIGINT)

        def token(number: int) -> None:
            on_token(number)
            signal.raise_signal(signal.SIGINT)

        return real(self, prompt, config, token, cancelled)

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(chat_module, "_is_terminal", lambda: True)
    monkeypatch.setattr(Answerer, "answer", answer)
    before = signal.getsignal(signal.SIGINT)
    result = run("chat", "--model", tiny, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "; stopped]" in result.stderr
    assert "stopped before the answer began: the message is taken back" in result.stderr
    assert taken[1][: len(taken[0])] == taken[0]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.full
def test_the_terminal(tiny: Path) -> None:
    """Several lines; Ctrl-C stops an answer, and at the prompt it leaves with the second."""
    terminal = Terminal(tiny)
    terminal.read_until("> $")
    for message, echo in (("Emma \\\nwas\n", r"\. was"), ('"""\nMr.\nK.\n"""\n', r'\. """')):
        terminal.type(message)
        terminal.read_until(echo)
        terminal.read_until("[a-z]{2}")  # the answer has begun, and would go on
        terminal.type(CTRL_C)
        terminal.read_until("; stopped\\]")
        terminal.read_until("> $")
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl-C again or Ctrl-D leaves")
    terminal.read_until("> $")
    terminal.type(CTRL_C)
    assert terminal.process.wait(60) == 0


def test_what_leaves_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-D, or Ctrl-C twice with nothing in between."""
    steps: Any = SimpleNamespace(say=lambda *words: None)
    monkeypatch.setattr(chat_module, "_is_terminal", lambda: True)

    def typed(*keys: str | type[BaseException]) -> list[str]:
        rest = iter(keys)

        def enter(prompt: str) -> str:
            key = next(rest)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr("builtins.input", enter)
        messages = list(chat_module._messages(steps))
        assert next(rest, None) is None
        return messages

    assert typed("a", EOFError) == ["a"]
    assert typed(KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt) == ["a"]
    assert typed("a\\", "b\\", "c", EOFError) == ["a\nb\nc"]
    assert typed('"""', "a", "", "b\\", '"""', EOFError) == ["a\n\nb\\"]
    assert typed("a\\", KeyboardInterrupt, "b", EOFError) == ["b"]
