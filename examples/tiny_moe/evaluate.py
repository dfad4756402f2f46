"""Held-out perplexity, routing and a sample of a model directory, several ways of running it.

    python evaluate.py --bf16 tiny_bf16 --mxfp4 model --json results.json

Ways: the BF16 checkpoint under plain Transformers; the MXFP4 checkpoint under plain Transformers,
its experts dequantized first; the MXFP4 checkpoint through hybrid_moe. These two run the same
weights: they may differ by the rounding of activations only (docs/numerics.md). Then the same with
the other linear layers and the embedding in INT8 and in MXFP4, whose weights are rounded once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpus import CACHE, read_books
from routing import LayerRouting, RoutingStats
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_moe.formats.mx import MXFP4

log = logging.getLogger("tiny_moe.evaluate")

PROMPT = "Mr. Elliot had been waiting in the drawing-room for half an hour, when"


@dataclass(frozen=True)
class Perplexity:
    """Of one text: exp(mean negative log-likelihood) per token and per byte of UTF-8."""

    tokens: int
    bytes: int
    per_token: float
    per_byte: float


@torch.inference_mode()
def perplexity(
    model: Callable[..., Any],
    tokenizer: Any,
    text: str,
    sequence: int = 512,
    batch: int = 8,
    limit: int | None = None,
) -> Perplexity:
    """Perplexity of `text` in windows of `sequence` predicted tokens that do not overlap.

    Args:
        model: anything that maps ids [batch, T] to an object with `.logits` [batch, T, vocab].
        tokenizer: byte-level BPE, so that each character of a token's name is one byte.
        limit: use the first `limit` windows only.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) <= sequence:
        raise ValueError(f"the text has {len(ids)} tokens: more than {sequence} are needed")
    windows = ids.unfold(0, sequence + 1, sequence)[:limit]
    nats = 0.0
    for rows in tqdm(torch.split(windows, batch), unit="batch", leave=False, mininterval=2):
        logits = model(rows[:, :-1]).logits.float()
        targets = rows[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        nats += loss.double().sum().item()
    predicted = windows[:, 1:].flatten()
    size = sum(map(len, tokenizer.convert_ids_to_tokens(predicted.tolist())))
    tokens = len(predicted)
    return Perplexity(tokens, size, math.exp(nats / tokens), math.exp(nats / size))


def dequantize_checkpoint(source: Path, target: Path) -> None:
    """Writes the MXFP4 checkpoint `source` as a BF16 one: every MXFP4 value is exact in BF16."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in sorted(k for k in keys if not k.endswith("_scale")):
                tensor = file.get_tensor(key)
                if f"{key}_scale" in keys:
                    scale = file.get_tensor(f"{key}_scale").view(torch.uint8)
                    values = MXFP4.dequantize(tensor.view(torch.uint8).numpy(), scale.numpy())
                    tensor = torch.from_numpy(values).bfloat16()
                tensors[key] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))


def plain_model(folder: Path) -> Any:
    """The BF16 checkpoint `folder` under Transformers alone."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    )


def dequantized_model(folder: Path) -> Any:
    """The MXFP4 checkpoint `folder` under Transformers alone, its experts in BF16."""
    with tempfile.TemporaryDirectory() as scratch:
        dequantize_checkpoint(folder, Path(scratch) / "dequantized")
        return plain_model(Path(scratch) / "dequantized")


def hybrid_model(folder: Path, dense: str = "bf16") -> Any:
    """The MXFP4 checkpoint `folder` through hybrid_moe, its other linear layers as `dense` says."""
    import hybrid_moe

    return hybrid_moe.from_pretrained(folder, method="MXFP4", dense=dense)


WAYS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "BF16, Transformers": ("bf16", plain_model),
    "MXFP4, Transformers": ("mxfp4", dequantized_model),
    "MXFP4, hybrid_moe": ("mxfp4", hybrid_model),
    "MXFP4, hybrid_moe, dense int8": ("mxfp4", partial(hybrid_model, dense="int8")),
    "MXFP4, hybrid_moe, dense mxfp4": ("mxfp4", partial(hybrid_model, dense="mxfp4")),
}
"""Name of a way -> the checkpoint it runs, and how that is loaded."""


def sample(model: Any, tokenizer: Any, prompt: str, seed: int, tokens: int = 120) -> str:
    """`prompt` continued at temperature 0.7 from the likeliest 40 tokens."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": True, "temperature": 0.7, "top_k": 40, "max_new_tokens": tokens}
    output = model.generate(**inputs, **options)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def results_table(results: dict[str, dict[str, Perplexity]]) -> str:
    """Markdown: a row per way, two columns per book."""
    books = list(next(iter(results.values())))
    head = [f"{book}: per token | per byte" for book in books]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|---:|" * len(books)]
    for name, row in results.items():
        cells = [f"{row[book].per_token:.3f} | {row[book].per_byte:.4f}" for book in books]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement(results: dict[str, dict[str, Perplexity]]) -> str:
    """One line per book: by how much the two ways of running the MXFP4 weights differ."""
    if not {"MXFP4, Transformers", "MXFP4, hybrid_moe"} <= results.keys():
        return ""
    plain, hybrid = results["MXFP4, Transformers"], results["MXFP4, hybrid_moe"]
    return "\n".join(
        f"{book}: perplexity per token through hybrid_moe against Transformers, MXFP4: "
        f"{ours.per_token / plain[book].per_token - 1:+.4%}"
        for book, ours in hybrid.items()
    )


def routing_table(rows: list[LayerRouting]) -> str:
    """Markdown: a row per layer."""
    lines = [
        "| layer | entropy, bits | of log2 E | per token, bits | least used | most used | dead |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.layer} | {r.entropy:.3f} | {r.relative_entropy:.1%} | {r.token_entropy:.3f} "
            f"| {r.least:.2%} | {r.most:.2%} | {r.dead} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bf16", type=Path, help="BF16 checkpoint")
    parser.add_argument("--mxfp4", type=Path, help="MXFP4 checkpoint")
    parser.add_argument("--skip", nargs="*", default=[], choices=WAYS, help="ways to leave out")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--windows", type=int, help="windows per book; all by default")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the packages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if not (args.bf16 or args.mxfp4):
        parser.error("give --bf16, --mxfp4 or both")
    if args.threads:
        torch.set_num_threads(args.threads)

    books = read_books("heldout", args.cache)
    table: dict[str, dict[str, Perplexity]] = {}
    routing: dict[str, list[LayerRouting]] = {}
    samples: dict[str, str] = {}
    for name, (kind, load) in WAYS.items():
        folder = getattr(args, kind)
        if folder is None or name in args.skip:
            continue
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        start = time.perf_counter()
        with RoutingStats(model) as stats:
            table[name] = {
                book: perplexity(model, tokenizer, text, limit=args.windows)
                for book, text in books.items()
            }
        routing[name] = stats.rows()
        samples[name] = sample(model, tokenizer, args.prompt, args.seed)
        log.info("%s: %.0f s", name, time.perf_counter() - start)
    print(results_table(table), agreement(table), sep="\n\n")
    for name, rows in routing.items():
        print(f"\n{name}, both books:\n\n{routing_table(rows)}")
    for name, text in samples.items():
        print(f"\n{name}:\n\n{text}")
    if args.json:
        report = {
            "perplexity": {n: {b: asdict(p) for b, p in r.items()} for n, r in table.items()},
            "routing": {n: [asdict(row) for row in rows] for n, rows in routing.items()},
            "samples": samples,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
