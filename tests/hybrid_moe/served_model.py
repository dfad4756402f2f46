"""The small model of this repository with a chat template, its expected answers, and `serve`."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import transformers

from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.integrations.transformers.serving.answers import Answerer

MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['content'] + '\\n' }}{% endfor %}"
    "{% if reasoning_effort %}{{ 'Chapter ' + reasoning_effort }}{% endif %}"
)
NAMES = ("Emma", "Harriet", "Elinor", "Marianne", "Fanny", "Catherine", "Jane", "Anne")
PROMPTS = [f"{name} was {what}," for name in NAMES for what in ("surprised", "not sorry", "gone")]
"""They differ at once, and are short: no answer depends on those before it."""


def write_chat_model(directory: Path) -> Path:
    """Links to the model, and a chat template."""
    directory.mkdir(parents=True)
    for file in MODEL.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Expected:
    """What the model answers, computed in this process without a server.

    Args:
        directory: of `write_chat_model`.
    """

    def __init__(self, directory: Path) -> None:
        self.model: Any = from_pretrained(directory, None, threads=1, progress=False)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
        self._known: dict[tuple[str, int], str] = {}

    def text(self, prompt: str, tokens: int) -> str:
        """The likeliest continuation."""
        if (prompt, tokens) not in self._known:
            config = transformers.GenerationConfig(
                max_new_tokens=tokens, do_sample=False, eos_token_id=0, pad_token_id=0
            )
            answer = Answerer(self.model).answer(self.tokenizer(prompt)["input_ids"], config)
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            self._known[prompt, tokens] = text
        return self._known[prompt, tokens]

    def chat(self, message: str, tokens: int) -> str:
        """The answer to a message."""
        return self.text(message + "\n", tokens)


class ServeProcess:
    """`hybrid-moe serve` in a process of its own, on a free port.

    Attributes:
        url: of its API.
        process: the process. lines: of its stderr.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        program = "from hybrid_moe.cli import main; main()"
        words = ("serve", "--model", str(directory), "--port", "0", "--threads", "1", *options)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r" at (http://\S+/v1)", line):
                self.url = found[1]
                break
        assert self.url, "".join(self.lines)
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()

    def end(self, signal_number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(signal_number)
        code = self.process.wait(60)
        self._reader.join(60)
        return code
