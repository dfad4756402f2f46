"""The `hybrid-moe` command in this process, and a model for it that has a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from hybrid_moe.cli import app
from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.tiny_models import build

PROMPT = "Hello there"
CHARACTERS = ["<unk>", *map(chr, range(32, 127))]


def run(*arguments: object, **options: Any) -> Any:
    """Result of the command with these words."""
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def write_model(directory: Path) -> Path:
    """A tiny Qwen3-MoE in `directory`, with a tokenizer of single characters."""
    save(build("qwen3_moe"), directory)
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(directory)
    return directory
