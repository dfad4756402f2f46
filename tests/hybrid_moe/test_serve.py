"""`hybrid-moe serve` without a GPU, asked by the official client over loopback."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason='the extra "serve" is not installed')
pytest.importorskip("transformers.cli.serving.server", reason="Transformers 5.23's")

import openai  # noqa: E402
import uvicorn  # noqa: E402

from hybrid_moe.integrations.transformers.serving.answer_queue import AnswerQueue  # noqa: E402
from hybrid_moe.integrations.transformers.serving.answers import Answer, Answerer  # noqa: E402
from hybrid_moe.integrations.transformers.serving.server import make_app  # noqa: E402
from tests.hybrid_moe.served_model import (  # noqa: E402
    PROMPTS,
    Expected,
    ServeProcess,
    write_chat_model,
)

FULL = bool(os.environ.get("HYBRID_MOE_TEST_FULL"))
REQUESTS = 400 if FULL else 24
TOKENS = 10
CONTEXT = 200


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def expected(directory: Path) -> Expected:
    return Expected(directory)


class Told(list[tuple[str, Answer]]):
    """A list whose methods a test may replace."""


@pytest.fixture(scope="module")
def answers() -> Told:
    """What the server has told of its answers."""
    return Told()


@pytest.fixture(scope="module")
def client(expected: Expected, answers: list[tuple[str, Answer]]) -> Iterator[openai.OpenAI]:
    """Of a server in this process."""
    queue = AnswerQueue(
        Answerer(expected.model), CONTEXT, lambda request, answer: answers.append((request, answer))
    )
    app = make_app("tiny", expected.model, expected.tokenizer, queue)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield client_of(f"http://127.0.0.1:{port}/v1")
    server.should_exit = True
    thread.join()
    queue.join()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def message(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, prompt: str, kind: str, tokens: int = TOKENS, **more: Any) -> str:
    """The text of an answer, which must be whole: as long as was asked, and no other's."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": tokens, "temperature": 0, **more}
    chat, text = {**asked, "messages": message(prompt)}, {**asked, "prompt": prompt}
    if kind == "chat":
        answer = client.chat.completions.create(**chat)  # type: ignore[call-overload]
        assert answer.usage.completion_tokens <= tokens
        assert answer.choices[0].finish_reason in ("length", "stop")
        return str(answer.choices[0].message.content)
    if kind == "text":
        answer = client.completions.create(**text)  # type: ignore[call-overload]
        return str(answer.choices[0].text)
    if kind == "chat stream":
        pieces = list(client.chat.completions.create(**chat, stream=True))  # type: ignore[call-overload]
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        assert {piece.id for piece in pieces} == {pieces[0].id}
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)
    pieces = list(client.completions.create(**text, stream=True))  # type: ignore[call-overload]
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
    return "".join(piece.choices[0].text for piece in pieces)


KINDS = ("chat", "text", "chat stream", "text stream")


def right_answer(expected: Expected, prompt: str, kind: str, tokens: int = TOKENS) -> str:
    if kind.startswith("chat"):
        return expected.chat(prompt, tokens)
    return expected.text(prompt, tokens)


def ask_many(client: openai.OpenAI, expected: Expected, count: int) -> None:
    """From eight threads at once; some give up early. No answer may be another's, or cut."""
    jobs = [
        (prompt, random.Random(i).choice(KINDS), i)
        for i, prompt in enumerate(PROMPTS[i % len(PROMPTS)] for i in range(count))
    ]
    right = {(p, kind): right_answer(expected, p, kind) for p, kind, _ in jobs}

    def one(job: tuple[str, str, int]) -> tuple[str, str] | None:
        prompt, kind, number = job
        if number % 6 == 5:  # a reader that goes away
            stream = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=150, stream=True
            )
            next(iter(stream))
            stream.close()
            return None
        return ask(client, prompt, kind), right[prompt, kind]

    with ThreadPoolExecutor(8) as threads:
        pairs = [pair for pair in threads.map(one, jobs) if pair is not None]
    assert len(pairs) == count - count // 6
    assert [given for given, _ in pairs] == [wanted for _, wanted in pairs]


def test_many_requests_at_once(client: openai.OpenAI, expected: Expected) -> None:
    ask_many(client, expected, REQUESTS)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_an_answer_and_are_no_part_of_it(
    client: openai.OpenAI, expected: Expected, kind: str, answers: list[tuple[str, Answer]]
) -> None:
    whole = right_answer(expected, PROMPTS[0], kind, 40)
    stop = whole[len(whole) // 2 :][:3]
    text = ask(client, PROMPTS[0], kind, 40, stop=[stop, "never said"])
    assert text == whole[: whole.index(stop)]
    assert answers[-1][1].end == "stop" and len(answers[-1][1].tokens) < 40


def test_an_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Emma was " * 60, temperature=0)
    assert answer.usage is not None and answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_a_seed_is_of_its_own_request(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model="tiny", prompt="Emma", temperature=1.5, seed=seed, max_tokens=12
        )
        return answer.choices[0].text

    alone = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(draw, range(6))) == alone
    assert len(set(alone)) > 1


def test_responses(client: openai.OpenAI, expected: Expected) -> None:
    """An answer that was cut off says so."""
    given: dict[str, Any] = {"model": "tiny", "input": PROMPTS[0], "max_output_tokens": 16}
    right = expected.chat(PROMPTS[0], 16)
    response = client.responses.create(**given, temperature=0)
    assert (response.output_text, response.status) == (right, "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**given, temperature=0, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == right
    assert events[-1].type == "response.incomplete"


def test_the_effort_reaches_the_template(client: openai.OpenAI, expected: Expected) -> None:
    right = expected.text(PROMPTS[0] + "\nChapter high", 16)
    chat = ask(client, PROMPTS[0], "chat", 16, reasoning_effort="high")
    response = client.responses.create(
        model="tiny", input=PROMPTS[0], max_output_tokens=16, temperature=0,
        reasoning={"effort": "high"},
    )  # fmt: skip
    assert chat == response.output_text == right


def test_what_is_served(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "hybrid_moe", CONTEXT)  # type: ignore[attr-defined]
    root = str(client.base_url).removesuffix("v1/")
    assert client.get(f"{root}health", cast_to=object) == {"status": "ok"}
    samples = urllib.request.urlopen(f"{root}metrics", timeout=60)
    assert samples.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    counted = re.findall(r'^hybrid_moe_cold_pairs_total{layer="(.+)"} (\d+)$',
                         samples.read().decode(), re.M)  # fmt: skip
    assert len(counted) > 1 and all(int(count) > 0 for _, count in counted)
    for path in ("/reset", "/load_model", "/v1/systemone", "/v1/audio/transcriptions", "/docs"):
        with pytest.raises(openai.NotFoundError, match=f"there is no {path} here"):
            client.post(f"{root}{path[1:]}", cast_to=object, body={})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": "org/other"}, "there is no model 'org/other' here, only 'tiny'"),
    "beyond the context": (
        {"messages": message("Emma was " * 100)},
        "the context is 200 tokens, but the prompt has 2.. and .* needs room",
    ),
    "an answer beyond the context": ({"max_tokens": 500}, "the prompt has .* and 500 more"),
    "no messages": ({"messages": []}, "messages must be a list of objects, one at least"),
    "a number for a message": ({"messages": [{"role": "user", "content": 7}]}, "messages must be"),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "KeyError: 'text'",
    ),
    "a role that the template refuses": (
        {"messages": [{"role": "tool", "content": "x"}]}, "chat template refuses this: no tools",
    ),
    "several answers": ({"n": 2}, "n=2 is not supported here"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format=.* not supported"),
    "a temperature": ({"temperature": -1}, "temperature=-1 must be a number from 0 to 2"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0 must be an integer from 1"),
    "an empty stop string": ({"stop": ["a", ""]}, "must be a string or a list of strings"),
    "an unknown field": ({"extra_body": {"wild": 1}}, "Unexpected fields in the request: {'wild'}"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_answered(client: openai.OpenAI, name: str, stream: bool) -> None:
    changes, sentence = REFUSED[name]
    given = {"model": "tiny", "messages": message("Emma"), "stream": stream, **changes}
    with pytest.raises(openai.APIStatusError, match=sentence) as caught:
        client.chat.completions.create(**given)
    assert 400 <= caught.value.status_code < 500
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_a_body_that_is_no_object(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="must be one JSON object"):
        client.post("/completions", cast_to=object, body=["x"])


def test_without_a_chat_template(client: openai.OpenAI, expected: Expected) -> None:
    template, expected.tokenizer.chat_template = expected.tokenizer.chat_template, None
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template: send text to /v1/comp"):
            ask(client, PROMPTS[0], "chat")
        assert ask(client, PROMPTS[0], "text") == expected.text(PROMPTS[0], TOKENS)
    finally:
        expected.tokenizer.chat_template = template


def until(condition: Callable[[], object]) -> None:
    """Wait for something that must come; the test runner's patience is the limit."""
    while not condition():
        time.sleep(0.01)


def test_a_client_that_leaves_frees_the_model(
    client: openai.OpenAI, answers: list[tuple[str, Answer]]
) -> None:
    """Whether it reads a stream or waits for a whole answer."""
    long: dict[str, Any] = {"model": "tiny", "prompt": "Emma", "max_tokens": CONTEXT - 10}
    before = len(answers)
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: len(answers) > before)
    assert answers[-1][1].end == "cancelled"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.15).completions.create(**long)
    assert ask(client, PROMPTS[1], "text")
    ends = [answer.end for _, answer in answers[before:]]
    assert ends in (["cancelled", "cancelled", "length"], ["cancelled", "length"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_while_generating_is_told(
    client: openai.OpenAI, expected: Expected, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError('no "memory"\nleft')

    monkeypatch.setattr(expected.model, "generate", fail)
    with pytest.raises(openai.APIError, match=r"no .memory."):
        answer = client.completions.create(model="tiny", prompt="Emma", stream=stream)
        list(answer)
    monkeypatch.undo()
    assert ask(client, PROMPTS[2], "text")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_while_it_is_reported_is_told(
    client: openai.OpenAI, answers: Told, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nobody reads the server's stderr any more."""

    def fail(told: tuple[str, Answer]) -> None:
        raise BrokenPipeError("nobody listens")

    monkeypatch.setattr(answers, "append", fail)
    patient = client.with_options(timeout=20)
    with pytest.raises(openai.APIError, match="nobody listens"):
        list(patient.completions.create(model="tiny", prompt="Emma", max_tokens=2, stream=stream))


def test_sigterm_ends_it_cleanly(directory: Path, expected: Expected) -> None:
    """Who still waits is told, in a stream and else; nobody gets half an answer for a whole one."""
    server = ServeProcess(directory, "--grace", "0", "--draft", "prompt")
    client = client_of(server.url)
    assert ask(client, PROMPTS[3], "chat") == expected.chat(PROMPTS[3], TOKENS)
    long: dict[str, Any] = {"model": "tiny", "prompt": "Emma", "max_tokens": 1000}
    streams = [client.completions.create(**long, stream=True) for _ in range(3)]
    next(iter(streams[0]))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.completions.create, **long)
        assert server.end(signal.SIGTERM) == 0
        for stream in streams:
            with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
                list(stream)
        with pytest.raises(openai.APIError, match=r"stopped before|stopping|Connection error"):
            waiting.result()
    assert server.lines[-1] == "stopped\n"
    assert not any("Traceback" in line for line in server.lines)


@pytest.mark.full
def test_killed_and_started_again(directory: Path, expected: Expected) -> None:
    """A client notices that its answer is not whole; the next server answers as the first did."""
    for number in (signal.SIGKILL, signal.SIGINT):
        server = ServeProcess(directory, "--grace", "0")
        client = client_of(server.url)
        ask_many(client, expected, 100)
        stream = client.completions.create(model="tiny", prompt="Emma", max_tokens=900, stream=True)
        next(iter(stream))
        code = server.end(number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        with pytest.raises(Exception, match=r"[Cc]onnection|closed|stopped before"):
            list(stream)
