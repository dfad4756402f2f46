"""A smaller model that drafts for another one, on the same pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.integrations.transformers.dense.dense_loading import DenseOptions, offload_dense
from hybrid_moe.integrations.transformers.options import dense_format
from hybrid_moe.integrations.transformers.packing_bar import PackingBar
from hybrid_moe.integrations.transformers.registration import check_directory, from_pretrained
from hybrid_moe.integrations.transformers.step.prepare import prepare_steps
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.loaders.model_config import NUM_EXPERTS


def load_draft(
    directory: str | Path,
    model: Any,
    threads: int | None = None,
    pools: int | None = None,
    dense: str = "bf16",
    progress: bool = True,
) -> Any:
    """Load a model to pass as `assistant_model` of `model.generate`. It may have experts or none;
    without, it is where the model is.

    Args:
        directory: a checkpoint, as for `from_pretrained`.
        model: what it drafts for.
        threads, pools, dense, progress: see `from_pretrained`.

    Raises:
        ValueError: its tokens are not those of the model.
        FileNotFoundError, CheckpointError, NotImplementedError: see `from_pretrained`.
    """
    path = check_directory(directory)
    config = Checkpoint.open(path).model
    tokens, mine = config.get(("vocab_size",)), model.config.get_text_config().vocab_size
    if tokens != mine:
        raise ValueError(
            f"{path} has {tokens} tokens, the model that it is to draft for {mine}: a draft needs "
            "the same tokenizer"
        )
    if config.integer(NUM_EXPERTS):
        return from_pretrained(path, None, threads, pools, dense=dense, progress=progress)
    if path.is_file():
        raise ValueError(f"{path}: a draft in one GGUF file must be a mixture of experts")
    import transformers

    pool, fmt = PoolConfig.choose(threads, pools), dense_format(dense)
    draft = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    draft = draft.to(model.device).eval()
    if fmt is not None and draft.device.type == "cpu":
        with PackingBar("Packing the draft", progress) as bar:
            offload_dense(draft, {}, DenseOptions(fmt, pool), bar)
    prepare_steps(draft, pool)
    return draft
