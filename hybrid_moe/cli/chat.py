"""`hybrid-moe chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_moe.cli import machine_options as shared
from hybrid_moe.cli import model_options as o
from hybrid_moe.cli.conversation import ContextFullError, Conversation
from hybrid_moe.cli.generate import speeds
from hybrid_moe.cli.models import ModelOption
from hybrid_moe.cli.terminal import Steps, text_writer

if TYPE_CHECKING:
    from hybrid_moe.integrations.transformers.serving.answers import Answer, Answerer

COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation; the system prompt stays",
    "/exit": "leave; so do Ctrl-D and, at the prompt, Ctrl-C twice",
}

PROMPT, CONTINUED, QUOTES = "> ", ". ", '"""'
LEAST_ROOM = 256
"""Tokens that are kept free for an answer; a quarter of the context where that is less."""


def chat(
    model: ModelOption,
    system: Annotated[str, typer.Option(help="Instructions in front of the conversation.")] = "",
    method: shared.MethodOption = None,
    dense: shared.DenseOption = o.DENSE,
    threads: shared.ThreadsOption = None,
    pools: shared.PoolsOption = None,
    gpu_experts: o.GpuExpertsOption = None,
    gpu_backend: o.GpuBackendOption = None,
    cpu_activation: o.CpuActivationOption = None,
    cache: o.CacheOption = None,
    draft: o.DraftOption = None,
    context: shared.ContextOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of an answer; default: what the context has.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 takes the likeliest token; default: as the model says."),
    ] = None,
    seed: o.SeedOption = 0,
) -> None:
    """Talk to a model.

    A line is a message. A line that ends with a backslash goes on in the next one, and a message
    may stand between two lines of \"\"\". Ctrl-C stops an answer, Ctrl-D leaves, /help shows the
    commands. Without a terminal every line of stdin is a message. Answers go to stdout, everything
    else to stderr.
    """
    options = o.LoadOptions(
        method, dense, threads, pools, gpu_experts, gpu_backend, cpu_activation, cache
    )
    with Steps() as steps:
        opened = o.OpenedModel.open(model, steps)
        opened.need_fast_tokenizer()
        conversation = Conversation(opened.tokenizer, system, opened.context(context))
        loaded = opened.load(options, steps)
        drafts = opened.load_draft(draft, loaded, options, steps)
        import torch

        from hybrid_moe.integrations.transformers.serving.answers import Answerer

        torch.manual_seed(seed)
        if not conversation.has_template:
            steps.say(
                "the tokenizer has no chat template: the model continues the text so far, what you "
                "type and what it answers",
                "yellow",
            )
        steps.say(f"context {conversation.context} tokens; /help shows the commands", "dim")
        answerer = Answerer(loaded, drafts)
        turns = _Turns(answerer, conversation, opened.tokenizer, steps, temperature, max_new_tokens)
        with _interrupts() as pressed:
            for message in _messages(steps):
                if message.strip() == "/exit":
                    break
                pressed.clear()  # of an answer that is over
                if not _command(message.strip(), conversation, steps):
                    turns.take(message, pressed)


def _command(text: str, conversation: Conversation, steps: Steps) -> bool:
    """Carry out a command; False for what is none."""
    if text == "/reset":
        conversation.reset()
        steps.say("forgotten", "dim")
    elif text == "/help":
        for name, what in COMMANDS.items():
            steps.say(f"{name:8}{what}")
    elif text.startswith("/") and len(text.split()) == 1:
        steps.say(f"there is no command {text}: /help shows those there are", "yellow")
    else:
        return not text
    return True


class _Turns:
    """Questions and their answers.

    Args:
        temperature, most: see `chat`.
    """

    def __init__(
        self, answerer: Answerer, conversation: Conversation, tokenizer: Any, steps: Steps,
        temperature: float | None, most: int | None,
    ) -> None:  # fmt: skip
        from hybrid_moe.integrations.transformers.hit_rates import hit_rates
        from hybrid_moe.integrations.transformers.serving.reply_format import response_template

        model = answerer.model
        self._answerer, self._conversation = answerer, conversation
        self._tokenizer, self._steps = tokenizer, steps
        self._temperature, self._most = temperature, most
        self._template = response_template(tokenizer, model.config.model_type)
        self._say, self._think = text_writer("green"), text_writer("dim")
        self._hits = hit_rates(model)

    def take(self, message: str, cancelled: threading.Event) -> None:
        """Answer a message, or say why not."""
        from hybrid_moe.integrations.transformers.serving.answers import CancelledError

        conversation, context = self._conversation, self._conversation.context
        wanted = min(self._most or LEAST_ROOM, max(1, context // 4))
        try:
            prompt, dropped = conversation.ask(message, wanted)
        except ContextFullError as error:
            self._steps.say(str(error), "yellow")
            return
        if dropped:
            self._steps.say(
                f"the context of {context} tokens is full: the {dropped} oldest messages are "
                "forgotten",
                "yellow",
            )
        room = context - len(prompt)
        config = o.sampling(self._answerer.model, min(self._most or room, room), self._temperature)
        try:
            answer, text = self._answer(prompt, config, cancelled)
        except CancelledError:
            conversation.unask()
            self._steps.say("stopped before the answer began: the message is taken back", "yellow")
            return
        finally:
            self._steps.drop()
        conversation.answered(text)
        self._steps.say(self._summary(answer), "dim")

    def _answer(
        self, prompt: list[int], config: Any, cancelled: threading.Event
    ) -> tuple[Answer, str]:
        """Generate and print. The text is what was said, without thoughts."""
        from hybrid_moe.integrations.transformers.serving.reply_format import ReplyText

        reply = ReplyText(self._tokenizer, self._template, prompt)
        said: list[str] = []

        def show(pieces: list[tuple[str, bool]]) -> None:
            for text, is_thought in pieces:
                (self._think if is_thought else self._say)(text)
                if not is_thought:
                    said.append(text)

        def on_token(token: int) -> None:
            self._steps.drop()
            show(reply.feed(token))

        self._steps.begin("reading")
        answer = self._answerer.answer(prompt, config, on_token, cancelled)
        show(reply.end())
        typer.echo("")
        return answer, "".join(said)

    def _summary(self, answer: Answer) -> str:
        """The speed, the context, and why the answer ended if not by itself."""
        context = self._conversation.context
        used = answer.prompt + len(answer.tokens)
        text = f"{speeds(answer)}; context {used} of {context} tokens"
        if answer.reused:
            text += f", {answer.reused} kept from before"
        if answer.end == "length":
            full = "the context is full" if used >= context else f"--max-new-tokens {self._most}"
            text += f"; cut off: {full}"
        elif answer.end == "cancelled":
            text += "; stopped"
        return f"[{text}{self._new_hits()}]"

    def _new_hits(self) -> str:
        """How often experts were found on a GPU since the last answer; nothing where none is."""
        from hybrid_moe.integrations.transformers.hit_rates import hit_rates

        before, now = self._hits, hit_rates(self._answerer.model)
        if before is None or now is None:
            return ""
        self._hits = now
        return f"; {(now - before).summary()}"


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, and raises only where something is typed."""
    pressed = threading.Event()
    with _handling(lambda number, frame: pressed.set()):
        yield pressed


@contextlib.contextmanager
def _handling(handler: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _messages(steps: Steps) -> Iterator[str]:
    """What is typed, message by message, until the end of the input or a second Ctrl-C."""
    if not _is_terminal():
        while line := _reading(sys.stdin.readline):
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (gives `input` line editing and a history)
    pressed = False
    while True:
        try:
            message = _reading(_typed)
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("")
            if pressed:
                return
            pressed = True
            steps.say("Ctrl-C again or Ctrl-D leaves", "dim")
            continue
        pressed = False
        yield message


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _reading(read: Callable[[], str]) -> str:
    with _handling(signal.default_int_handler):
        return read()


def _typed() -> str:
    """A message of one line or of several."""
    line = input(PROMPT)
    lines = []
    if line.strip() == QUOTES:
        while (line := input(CONTINUED)).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines)
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input(CONTINUED)
    return "\n".join([*lines, line])
