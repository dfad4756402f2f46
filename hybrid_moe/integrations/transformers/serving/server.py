"""Transformers' own OpenAI-compatible server over one model that is loaded here.

Its application and its request handlers are Transformers' (`transformers.cli.serving`); from here
come the model (as another process it would load the checkpoint itself, without our kernels), the
queue, and what a request may ask for. Answers are generated one at a time, in the order of the
requests: Transformers' continuous batching has one sampling configuration for all requests and an
attention and a cache of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from hybrid_moe.integrations.transformers.serving.answer_queue import (
    AnswerQueue,
    GenerationFailedError,
)
from hybrid_moe.integrations.transformers.serving.reply_format import response_template
from hybrid_moe.integrations.transformers.serving.request_checks import (
    Served,
    check_request,
    set_effort,
)
from hybrid_moe.runtime.metrics import metrics

METRICS = "/metrics"
"""What the experts have done so far, for Prometheus."""

ROUTES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/health",
    METRICS,
}
"""Those of Transformers' server that make sense for one language model, none that loads or unloads
a model; and ours."""

LARGEST_BODY = 64 << 20
"""Bytes of a request: far more than the text of a million tokens."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def make_app(name: str, model: Any, tokenizer: Any, queue: AnswerQueue) -> Any:
    """The ASGI application that serves `model` as `name`; answers come from `queue`."""
    manager = _OneModel(name, model, tokenizer, queue.context)
    state = _OneQueue(queue)
    app = build_server(
        manager,
        _Chat(manager, state),
        completion_handler=_Completion(manager, state),
        response_handler=_Response(manager, state),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.add_api_route(METRICS, _metrics, methods=["GET"])
    app.add_exception_handler(HTTPException, _refusal)
    app.add_exception_handler(RequestValidationError, _no_json)
    app.add_exception_handler(GenerationFailedError, _failure)
    return _Connections(app)


async def _metrics() -> PlainTextResponse:
    return PlainTextResponse(metrics().prometheus(), media_type="text/plain; version=0.0.4")


class _OneModel(ModelManager):  # type: ignore[misc]
    """Has the model already, loads no other, and keeps it."""

    def __init__(self, name: str, model: Any, tokenizer: Any, context: int) -> None:
        super().__init__(device="cpu", model_timeout=-1)
        self.name, self.tokenizer, self.context = name, tokenizer, context
        # What handlers ask of a model. Its type would let them read answers by a template that may
        # not be the tokenizer's
        self.model = SimpleNamespace(
            config=SimpleNamespace(model_type=None),
            generation_config=model.generation_config,
            device=model.device,
        )
        tokenizer.response_template = response_template(tokenizer, model.config.model_type)
        self.since = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id: str, *args: Any, **kwargs: Any) -> Any:
        if model_id != self.name:
            raise HTTPException(404, f"there is no model {model_id!r} here, only {self.name!r}")
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override,unused-ignore]
        return [
            {
                "id": self.name,
                "object": "model",
                "created": self.since,
                "owned_by": "hybrid_moe",
                "max_model_len": self.context,
            }
        ]

    def shutdown(self) -> None:
        """The model stays until the process ends."""


class _OneQueue(GenerationState):  # type: ignore[misc]
    """One queue for all requests, whichever the handler."""

    def __init__(self, queue: AnswerQueue) -> None:
        super().__init__()
        self.queue = queue

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> AnswerQueue:
        return self.queue


class _Checked:
    """A request handler whose requests are checked before anything is done with them."""

    model_manager: _OneModel

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        body.setdefault("model", self.model_manager.name)
        body.setdefault("stream", False)
        self._check(body)
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            # Transformers' handlers take messages apart without looking
            raise HTTPException(400, f"{type(error).__name__}: {error}") from error
        except TemplateError as error:
            raise HTTPException(400, f"the chat template refuses this: {error}") from error

    def _check(self, body: dict[str, Any]) -> None:
        check_request(body)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)  # type: ignore[misc]
        set_effort(body)  # now, as the field that it sets is not one of each interface

    def _build_generation_config(
        self, body: dict[str, Any], model_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        served = Served.of(body)
        asked = {**body, "seed": None, "stop": None}  # ours: at its turn, and cut from the text
        config = super()._build_generation_config(asked, model_config, use_cb=use_cb)  # type: ignore[misc]
        config.max_new_tokens = served.max_tokens  # None: up to the context
        if served.samples is not None:
            config.do_sample = served.samples
        config.served = served
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        served, events = _config(args, kwargs).served, response.body_iterator

        async def corrected() -> Any:
            async for text in events:
                yield _FAILED.sub(_failed_event, self._correct(text, served))

        response.body_iterator = corrected()
        return response

    def _correct(self, text: str, served: Served) -> str:
        """Events as the client shall have them."""
        return text


class _NeedsTemplate(_Checked):
    """Messages become a prompt by the tokenizer's template."""

    def _check(self, body: dict[str, Any]) -> None:
        super()._check(body)
        if not self.model_manager.tokenizer.chat_template:
            name = self.model_manager.name
            raise HTTPException(
                400,
                f"the tokenizer of {name!r} has no chat template: send text to /v1/completions",
            )


class _Completion(_Checked, CompletionHandler):  # type: ignore[misc]
    pass


class _Chat(_NeedsTemplate, ChatCompletionHandler):  # type: ignore[misc]
    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response = await super()._non_streaming(*args, **kwargs)
        served = _config(args, kwargs).served
        if not served.stop:
            return response
        # Theirs comes from the tokens, of which the last may go on behind the stop string
        content = json.loads(response.body)
        message = content["choices"][0]["message"]
        message["content"] = served.cut(message.get("content") or "")
        return JSONResponse(content)


class _Response(_NeedsTemplate, ResponseHandler):  # type: ignore[misc]
    """Says of an answer that was cut off that it is incomplete, which Transformers' does not."""

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response = await super()._non_streaming(*args, **kwargs)
        if _config(args, kwargs).served.end == "length":
            return JSONResponse(_incomplete(json.loads(response.body)))
        return response

    def _correct(self, text: str, served: Served) -> str:
        if served.end != "length" or '"type":"response.completed"' not in text:
            return text
        event = json.loads(text.removeprefix("data: "))
        event["type"] = "response.incomplete"
        event["response"] = _incomplete(event["response"])
        return f"data: {json.dumps(event)}\n\n"


def _config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(a for a in (*args, *kwargs.values()) if isinstance(a, GenerationConfig))


_FAILED = re.compile(r'data: {"error": "(.*)"}\n')


def _failed_event(match: re.Match[str]) -> str:
    """The error of a stream as an object with a message, which clients look for."""
    error = {"message": match[1], "type": "server_error", "code": 500}
    return f"data: {json.dumps({'error': error})}\n"


def _incomplete(response: dict[str, Any]) -> dict[str, Any]:
    return {
        **response,
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
    }


def _error(status: int, message: str) -> JSONResponse:
    """In the words of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


async def _no_json(request: Request, error: Exception) -> JSONResponse:
    return _error(400, "the body of a request must be one JSON object")


async def _failure(request: Request, error: Exception) -> JSONResponse:
    return _error(500, str(error))


class _Connections:
    """Lets the application know when a client has gone, and answers paths that are not served.

    A handler that waits for its answer does not look at its connection. So its task is cancelled
    when the connection ends, and the queue drops the request.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] not in ROUTES:
            refusal = _error(404, f"there is no {scope['path']} here, only {', '.join(ROUTES)}")
            await refusal(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > LARGEST_BODY:
                refusal = _error(413, f"a request may have {LARGEST_BODY} bytes")
                await refusal(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        await self._run(scope, bytes(body), receive, send)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def replay() -> MutableMapping[str, Any]:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await asyncio.gather(work, return_exceptions=gone.is_set())
        finally:
            work.cancel()
            watcher.cancel()
