"""The texts that `hybrid-moe profile` reads: prompts of a few hundred tokens out of files.

A `.txt` file is one document. A `.jsonl` file has one a line: a string, or an object with `text`,
`prompt` or `messages` (a conversation, which the tokenizer's template writes out). Documents are
cut into pieces of one prompt each. Where there are more pieces than wanted, those that are taken
lie evenly over the whole: a profile of a book has its end, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHARACTERS = 6
"""Of a token at most, on average: pieces are cut before they are tokenized, by characters."""

Document = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file, empty ones left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither .txt nor .jsonl, not UTF-8, or a line that is no document.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt, a .jsonl, or a dump of SGLang's recorder (.pt)")
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _document(line: str, where: str) -> Document:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    given = found
    if isinstance(found, dict):
        names = [name for name in ("messages", "text", "prompt") if name in found]
        given = found[names[0]] if names else None
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(isinstance(m, dict) for m in given):
        return given
    raise ValueError(
        f"{where} must be a string, or an object with text, prompt or messages, not "
        f"{line.strip()[:60]}"
    )


def pieces(found: Iterator[Document], prompt: int) -> list[Document]:
    """Documents in pieces of about `prompt` tokens, or a little more; texts end between words."""
    made: list[Document] = []
    for document in found:
        if isinstance(document, list):
            made.append(document)
            continue
        length, start = prompt * CHARACTERS, 0
        while start < len(document):
            end = start + length
            if end < len(document) and (space := document.rfind(" ", start + 1, end)) > 0:
                end = space
            if document[start:end].strip():
                made.append(document[start:end])
            start = end
    return made


def spread(every: Sequence[Document], most: int) -> list[Document]:
    """`most` of them, evenly over all, in their order."""
    if len(every) <= most:
        return list(every)
    return [every[at * len(every) // most] for at in range(most)]


def prompt_ids(piece: Document, tokenizer: Any, prompt: int) -> list[int]:
    """The first `prompt` tokens of a piece; none where it has none.

    Raises:
        ValueError: messages, and the tokenizer has no template for them or refuses these.
    """
    if isinstance(piece, str):
        ids: list[int] = tokenizer(piece)["input_ids"]
        return ids[:prompt]
    try:
        text = tokenizer.apply_chat_template(piece, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's authors
        raise ValueError(
            f"the model's chat template does not take {piece!r:.80}: {error}"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:prompt]
