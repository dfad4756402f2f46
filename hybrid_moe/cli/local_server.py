"""`hybrid-moe serve` without a GPU: Transformers' server in this process."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Any

from hybrid_moe.cli import model_options as o
from hybrid_moe.cli.generate import speeds
from hybrid_moe.cli.terminal import Steps

if TYPE_CHECKING:
    from hybrid_moe.integrations.transformers.serving.answers import Answer

LAST_RESORT_S = 30
"""Seconds after which connections are cut that do not end although their answers have."""


def require_server() -> None:
    """Raise `ModuleNotFoundError` where the extra `serve` is not installed."""
    import fastapi  # noqa: F401
    import openai  # noqa: F401
    import uvicorn  # noqa: F401


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before minutes of loading: a taken port is an error at once.

    Raises:
        OSError: the address is taken, or is none.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return listener


def serve_here(
    model: str, options: o.LoadOptions, draft: str | None, context: int | None, grace: float,
    listener: socket.socket, steps: Steps,
) -> None:  # fmt: skip
    """Load a model and serve it until SIGINT or SIGTERM.

    Args:
        draft: what drafts tokens, see `OpenedModel.load_draft`.
        grace: seconds that answers then have to be completed.

    Raises:
        ValueError: see `OpenedModel`.
    """
    opened = o.OpenedModel.open(model, steps)
    longest = opened.context(context)
    opened.need_fast_tokenizer()
    loaded = opened.load(options, steps)
    drafts = opened.load_draft(draft, loaded, options, steps)
    import transformers

    from hybrid_moe.integrations.transformers.serving.answer_queue import AnswerQueue
    from hybrid_moe.integrations.transformers.serving.answers import Answerer
    from hybrid_moe.integrations.transformers.serving.server import make_app

    transformers.utils.logging.set_verbosity_error()  # its handlers warn of each request

    def report(request_id: str, answer: Answer) -> None:
        cut = {"stop": "", "length": "; cut off", "cancelled": "; given up"}[answer.end]
        steps.say(f"{request_id}: {speeds(answer)}{cut}", "dim")

    name = opened.served_name
    queue = AnswerQueue(Answerer(loaded, drafts), longest, report)
    if not opened.tokenizer.chat_template:
        steps.say("the tokenizer has no chat template: only /v1/completions", "yellow")
    server = _server(make_app(name, loaded, opened.tokenizer, queue), queue, grace)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    steps.say(f"serving {name!r} at http://{address}/v1, context {longest} tokens", "bold")
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn handles both and raises them again when it is done: no error then
        signal.signal(number, lambda number, frame: None)
    try:
        server.run([listener])
    finally:
        queue.join()
    steps.say("stopped", "dim")


def _server(app: Any, queue: Any, grace: float) -> Any:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Gives answers some seconds when it is told to stop, and then tells their clients."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace, queue.stop)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=round(grace) + LAST_RESORT_S,
    )
    return Server(config)
