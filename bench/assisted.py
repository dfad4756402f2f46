"""Drafts that are generated and checked: the small model with and without the gate.

    python bench/assisted.py

Texts are those of `regret.py`; drafts are the model's first layer alone, and what followed the last
two words where they were before. Without the gate each draft has as many tokens as it may. Answers
of all kinds take turns, so that none has the machine's better minutes; what the gate has learned
stays from one answer to the next. Speeds are of decode, behind the first token.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from regret import ROOT, TEXTS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import hybrid_moe
from hybrid_moe.integrations.transformers.gated_drafts import gate_drafts
from hybrid_moe.integrations.transformers.serving.answers import FROM_PROMPT, Answer, Answerer

FOLDER = ROOT / "examples" / "tiny_moe" / "model"
PROMPT, TOKENS = 200, 200
"""Tokens of each text that are read, and that are generated."""

LONGEST = 4
"""Tokens of a draft of the first layer; those from the prompt have as many as `Answerer` says."""

KINDS = ("no drafts", "first layer", "first layer, gated", "prompt", "prompt, gated")


def first_layer(model: Any) -> Any:
    """A draft of the model's first layer alone, its embedding, norm and output layer."""
    draft = copy.deepcopy(model)
    draft.model.layers = draft.model.layers[:1]
    draft.config.num_hidden_layers = 1
    draft.generation_config.num_assistant_tokens = LONGEST
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


@contextmanager
def gate(model: Any, on: bool) -> Iterator[None]:
    """Let drafts be gated, or as long as Transformers makes them."""
    if not on:
        del model._get_candidate_generator
    try:
        yield
    finally:
        gate_drafts(model)


def measure(rounds: int) -> dict[tuple[str, str], list[Answer]]:
    """(Text, kind) -> answers."""
    from transformers import AutoTokenizer, GenerationConfig

    model: Any = hybrid_moe.from_pretrained(FOLDER, method="MXFP4", progress=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    draft = first_layer(model)
    drafts = {"no drafts": None, "first layer": draft, "prompt": FROM_PROMPT}
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    answerers = {name: Answerer(model, drafts[name]) for name in drafts}
    found: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    rng, every = random.Random(0), [(text, kind) for text in TEXTS for kind in KINDS]
    cases = [case for _ in range(rounds) for case in rng.sample(every, len(every))]
    for text, kind in tqdm(cases):
        file = TEXTS[text]
        words = "It was a truth" if file is None else (ROOT / file).read_text("utf-8")
        ids = tokenizer(words)["input_ids"][:PROMPT]
        name, _, gated = kind.partition(", ")
        with gate(model, bool(gated)):
            found[text, kind].append(answerers[name].answer(ids, config))
            answerers[name].forget()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="answers of each kind and text")
    torch.set_num_threads(1)
    found = measure(parser.parse_args().rounds)
    table = Table("text", *KINDS)
    for text in TEXTS:
        cells = []
        for kind in KINDS:
            answers = found[text, kind]
            speed = median(answer.decode_speed or 0.0 for answer in answers)
            plain = median(answer.decode_speed or 0.0 for answer in found[text, KINDS[0]])
            cells.append(f"{speed:.0f} tok/s ({speed / plain:.2f})" + _drafted(answers))
        table.add_row(text, *cells)
    Console().print(
        table, "in brackets: over that without drafts; then drafted tokens and how many"
    )
    Console().print("of them were right, of all answers; without the gate they are not counted")


def _drafted(answers: list[Answer]) -> str:
    drafted = sum(answer.drafts.drafted for answer in answers if answer.drafts is not None)
    right = sum(answer.drafts.accepted for answer in answers if answer.drafts is not None)
    return f", {drafted}, {right / drafted:.0%}" if drafted else ""


if __name__ == "__main__":
    main()
