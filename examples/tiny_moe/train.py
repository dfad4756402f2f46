"""Trains a small mixture-of-experts language model on five novels, on a CPU in about half an hour.

Qwen3-MoE as Transformers has it: 4 layers, hidden 256, 16 experts of 128, 4 per token. The last
part of the training is quantization-aware (`fake_quant.py`). Deterministic: the same seed,
thread count, processor and torch give the same weights.

    python train.py --out tiny_bf16
"""

from __future__ import annotations

import os

# Threads that wait should sleep: spinning ones triple the time on a machine that other work shares.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import CACHE, read_books
from fake_quant import assert_equals_format, quantized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

log = logging.getLogger("tiny_moe.train")

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the training, besides steps, seed and threads."""

    vocab: int = 3072
    sequence: int = 512
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    """Weight of the load-balancing loss, the mean over layers."""
    quantized_part: float = 0.3
    """Share of the steps, at the end, that run on MXFP4-rounded experts."""


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab` entries: any text can be encoded, nothing is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line + "\n" for text in texts for line in text.splitlines()]
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def model_config(vocab: int, end_of_text: int) -> Qwen3MoeConfig:
    """About 8 million parameters, 6.3 million of them in experts."""
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def windows(tokens: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless windows of `length` + 1 tokens: each epoch cuts the text anew and shuffles."""
    while True:
        start = int(torch.randint(length, (), generator=generator))
        count = (len(tokens) - start - 1) // length
        for i in torch.randperm(count, generator=generator).tolist():
            at = start + i * length
            yield tokens[at : at + length + 1]


class Balance:
    """Collects each router's choices and gives the load-balancing loss.

    Per layer, E * sum over experts of (share of choices * mean probability): 1 where all
    experts are equally used (Switch Transformer, equation 4). Transformers' own auxiliary loss
    pools the layers, under which an expert may die in one layer as long as its namesakes do not.
    """

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.losses: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._collect)

    def _collect(self, _module: object, _args: object, output: tuple[Tensor, ...]) -> None:
        logits, _, chosen = output
        experts = logits.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        self.losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())

    def pop(self) -> Tensor:
        """Mean over the layers since the last call."""
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        return loss


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / min(recipe.warmup, steps))
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms and embedding are not decayed."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed" in n]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def token_loss(model: Qwen3MoeForCausalLM, batch: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of the tokens 1.. of each row of `batch`."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(
    model: Qwen3MoeForCausalLM, tokens: Tensor, heldout: Tensor, steps: int, seed: int, r: Recipe
) -> None:
    """Trains in place; checks the torch rounding against the format before and after its use.

    The loss on `heldout` [windows, tokens] is logged on the way, and used for nothing.
    """
    batches = windows(tokens, r.sequence, torch.Generator().manual_seed(seed))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    first_quantized = round(steps * (1 - r.quantized_part))
    optimizer = optimizer_for(model, r)
    balance = Balance(model)
    smooth = None

    def backward(batch: Tensor) -> float:
        loss = token_loss(model, batch)
        torch.autograd.backward(loss + r.balance * balance.pop())
        return loss.item()

    progress = tqdm(range(steps), unit="step", mininterval=5)
    for step in progress:
        batch = torch.stack([next(batches) for _ in range(r.batch)])
        if step == first_quantized:
            assert_equals_format(experts[0])
        if step >= first_quantized:
            with quantized(experts):
                loss = backward(batch)
        else:
            loss = backward(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, r)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        progress.set_postfix(loss=f"{smooth:.3f}", quantized=step >= first_quantized)
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                unseen = token_loss(model, heldout).item()
            balance.losses.clear()
            log.info("step %d: loss %.3f, held out %.3f nats per token", step + 1, smooth, unseen)
    for weight in experts:
        assert_equals_format(weight)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the BF16 checkpoint")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the packages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if args.steps < 1:
        parser.error("--steps must be at least 1")

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    recipe = Recipe()
    texts = list(read_books("train", args.cache).values())
    tokenizer = train_tokenizer(texts, recipe.vocab)
    ends = [tokenizer.eos_token_id]
    tokens = torch.tensor([t for text in texts for t in tokenizer(text)["input_ids"] + ends])
    config = model_config(len(tokenizer), tokenizer.eos_token_id)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm")
    size = sum(len(text.encode()) for text in texts)
    log.info(
        "%d parameters; %d tokens of %.2f bytes; %.1f epochs",
        sum(p.numel() for p in model.parameters()),
        len(tokens),
        size / len(tokens),
        args.steps * recipe.batch * recipe.sequence / len(tokens),
    )
    heldout = torch.tensor(tokenizer(read_books("heldout", args.cache)["persuasion"])["input_ids"])
    heldout = heldout.unfold(0, recipe.sequence + 1, recipe.sequence)[: 2 * recipe.batch]
    start = time.perf_counter()
    train(model, tokens, heldout, args.steps, args.seed, recipe)
    log.info("%d steps in %.1f minutes", args.steps, (time.perf_counter() - start) / 60)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
