"""Memory that is borrowed for a batch, and what runtimes take for themselves.

What this package borrows is computed from the same shapes as the jobs themselves. What SGLang and
Transformers take is assumed, and said so: the constants are here.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.job import JobShape, capacity_for
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.planning.model import Model

_GIB, _MIB = 1 << 30, 1 << 20

GPU_CONTEXT = _GIB
"""Assumed: CUDA context and libraries, and what the driver withholds, on each GPU."""

SGLANG_RAM, SGLANG_RAM_PER_GPU = 4 * _GIB, 2 * _GIB
"""Assumed: SGLang's processes (HTTP server, tokenizer, detokenizer), and a scheduler per GPU."""

TRANSFORMERS_RAM = 1 * _GIB
"""Assumed: Python with torch and Transformers, compiled kernels, tokenizer."""


def job_nbytes(model: Model, tokens: int, threads: int, pools: int) -> int:
    """Bytes of a job over a batch: staged inputs, routing, encoded rows, sums. Of the format that
    needs the most, where layers differ."""
    return max(_job_nbytes(model, fmt, tokens, threads, pools) for fmt in model.formats)


def _job_nbytes(model: Model, fmt: WeightFormat, tokens: int, threads: int, pools: int) -> int:
    kernels = format_kernels(fmt)
    return JobShape(
        capacity=capacity_for(tokens),
        top_k=model.top_k,
        experts=model.num_experts,
        hidden=model.hidden,
        x_row=kernels.encoding.row_bytes(model.hidden // GROUP),
        h_row=kernels.encoding.row_bytes(model.intermediate // GROUP),
        unpacked_bytes=kernels.unpacked_bytes,
        workers=threads,
        pools=pools,
    ).nbytes


def stream_buffers(model: Model, chunk: int, threads: int, pools: int) -> int:
    """Bytes of the pinned buffers and jobs behind a CUDA stream: one set for each power of two up
    to the chunk, of which all smaller ones together are as large as the largest."""
    tokens = capacity_for(chunk)
    pinned = tokens * (4 * model.hidden + 12 * model.top_k)
    return 2 * (job_nbytes(model, chunk, threads, pools) + pinned)


def cpu_buffers(model: Model, context: int, threads: int, pools: int) -> int:
    """Bytes of the largest job for CPU tensors; longer batches are cut."""
    return job_nbytes(model, min(context, MAX_TOKENS_PER_JOB), threads, pools)


def cpu_activations(model: Model, context: int) -> int:
    """Assumed for Transformers' prefill of a whole prompt: 16 tensors [tokens, H] of BF16."""
    return 32 * context * model.hidden


def gpu_reserve(chunk: int, requests: int, gpus: int, *, mla: bool) -> int:
    """Bytes of one GPU that SGLang's own rule keeps free for activations and CUDA graphs
    (`arg_groups/memory_hook.py` of 0.5.23): 512 MiB, 1.5 MiB for each token of a chunk (2048 at
    least), 1/8 GiB for each GPU, 2 MiB for each size of a decode graph; for prefill graphs 1.5 GiB
    with MLA, else 8 MiB for each of about 64 sizes."""
    graphs = 1536 if mla else 64 * 8
    return round((512 + 1.5 * max(chunk, 2048) + 128 * gpus + 2 * requests + graphs) * _MIB)
