"""The server's requests in a queue: one thread generates, the event loop waits."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    _StreamError,
    response_events_to_chunks,
)

from hybrid_moe.integrations.transformers.serving.answers import Answer, Answerer, CancelledError
from hybrid_moe.integrations.transformers.serving.reply_format import TokenText
from hybrid_moe.integrations.transformers.serving.stop_strings import StopStrings

STOPPED = "the server was stopped before the answer was complete"


class GenerationFailedError(RuntimeError):
    """An answer that could not be generated, through no fault of the request."""


class AnswerQueue(BaseGenerateManager):  # type: ignore[misc]
    """Generates the answers of a server's requests one after the other, in the order they came.

    Args:
        answerer: what generates them; no one else may use it.
        context: tokens that a prompt and its answer may have together.
        report: is told of each answer and the id of its request, from the generating thread.
    """

    def __init__(
        self,
        answerer: Answerer,
        context: int,
        report: Callable[[str, Answer], None] = lambda request_id, answer: None,
    ) -> None:
        self.context = context
        self._answerer = answerer
        self._report = report
        self._thread = ThreadPoolExecutor(1, "hybrid_moe answers")
        self._unfinished: set[threading.Event] = set()
        self._stopped = False

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], _Stream]:  # fmt: skip
        """The queue that gets the answer's text as it comes, and what counts and cancels it.

        Raises:
            HTTPException: the prompt and the answer are longer than the context.
        """
        prompt = self._prompt(inputs, gen_config)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        stream = _Stream(
            processor, asyncio.get_running_loop(), queue, response_parser,
            gen_config.served.stop,
        )  # fmt: skip

        def run() -> None:
            try:
                answer = self._answer(prompt, gen_config, request_id, stream.feed, stream.cancelled)
                stream.finish(STOPPED if answer.end == "cancelled" else None)
            except (CancelledError, GenerationFailedError) as error:
                stream.finish(str(error) or STOPPED)

        self._unfinished.add(stream.cancelled)
        future = self._submit(run)
        future.add_done_callback(lambda done: self._unfinished.discard(stream.cancelled))
        return queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """The answer's text, the prompt's length, and the answer's tokens.

        Raises:
            HTTPException: the prompt and the answer are longer than the context.
            GenerationFailedError: the answer failed, or the server was stopped.
        """
        prompt = self._prompt(inputs, gen_config)
        stop_strings = gen_config.served.stop
        stop = StopStrings(stop_strings)
        words = TokenText(processor, special=False)
        cancelled = threading.Event()

        def feed(token: int) -> bool:
            stop.feed(words.feed(token))
            return stop.found

        on_token = feed if stop_strings else None
        self._unfinished.add(cancelled)
        try:
            answer = await asyncio.wrap_future(
                self._submit(self._answer, prompt, gen_config, request_id, on_token, cancelled)
            )
        except CancelledError:
            raise GenerationFailedError(STOPPED) from None
        finally:
            cancelled.set()  # where this task was cancelled: the client has gone
            self._unfinished.discard(cancelled)
        if answer.end == "cancelled":
            raise GenerationFailedError(STOPPED)
        text = processor.decode(answer.tokens, skip_special_tokens=True)
        return gen_config.served.cut(text), answer.prompt, list(answer.tokens)

    def stop(self) -> None:
        """End the answer under way and those that wait; each client is told. Waits for neither."""
        self._stopped = True
        for cancelled in list(self._unfinished):
            cancelled.set()

    def join(self) -> None:
        """Stop, and wait until nothing is generated any more."""
        self.stop()
        self._thread.shutdown()

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._stopped:
            raise HTTPException(503, "the server is stopping")
        return self._thread.submit(function, *arguments)

    def _prompt(self, inputs: Any, config: Any) -> list[int]:
        """The prompt's tokens; `config.max_new_tokens` becomes what there is room for."""
        prompt: list[int] = inputs["input_ids"][0].tolist()
        if not prompt:
            raise HTTPException(400, "the prompt is empty: give at least one token to continue")
        room = self.context - len(prompt)
        asked = config.max_new_tokens
        if room < (asked or 1):
            raise HTTPException(
                400,
                f"the context is {self.context} tokens, but the prompt has {len(prompt)}"
                + (f" and {asked} more are asked for" if asked else " and the answer needs room")
                + ": shorten it, or start the server with a larger --context",
            )
        config.max_new_tokens = asked or room
        return prompt

    def _answer(
        self, prompt: list[int], config: Any, request_id: str,
        on_token: Callable[[int], bool | None] | None, cancelled: threading.Event,
    ) -> Answer:  # fmt: skip
        """On the generating thread."""
        served, given = config.served, copy.copy(config)
        del given.served
        if given.pad_token_id is None:
            given.pad_token_id = 0  # of one prompt none is used
        try:
            with torch.random.fork_rng(devices=[], enabled=served.seed is not None):
                if served.seed is not None:
                    torch.manual_seed(served.seed)
                answer = self._answerer.answer(prompt, given, on_token, cancelled)
            served.end = answer.end
            self._report(request_id, answer)
        except CancelledError:
            raise
        except Exception as error:  # whatever it is, the client is told rather than kept waiting
            raise GenerationFailedError(f"{type(error).__name__}: {error}") from error
        return answer


class _Stream(DirectStreamer):  # type: ignore[misc]
    """Transformers' stream to a handler, ended by stop strings, fed by `Answerer`."""

    def __init__(
        self, tokenizer: Any, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any],
        parser: Any, stop: tuple[str, ...],
    ) -> None:  # fmt: skip
        super().__init__(tokenizer._tokenizer, loop, queue, response_parser=parser)
        self.cancelled = self._cancelled
        self._stop = StopStrings(stop)
        self._words = TokenText(tokenizer, special=parser is not None)

    def feed(self, token: int) -> bool:
        self.total_tokens += 1
        self._pass(self._stop.feed(self._words.feed(token)))
        return self._stop.found

    def finish(self, problem: str | None) -> None:
        """Nothing more comes: the text is complete, or there is a problem."""
        if problem is not None:
            self._enqueue(_StreamError(_plain(problem)))
            return
        self._pass(self._stop.rest())
        self.end()

    def _pass(self, text: str) -> None:
        if text and self._parser is None:
            self._enqueue(text)
        elif text:
            for item in response_events_to_chunks(self._parser.feed(text)):
                self._enqueue(item)


def _plain(message: str) -> str:
    """Without what would break the JSON that Transformers' handlers write around it."""
    return " ".join(message.split()).replace("\\", "/").replace('"', "'")
