"""`hybrid-moe generate`: text from a model, streamed to the terminal, and its speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli import machine_options as shared
from hybrid_moe.cli import model_options as o
from hybrid_moe.cli.models import ModelOption
from hybrid_moe.cli.roofline import Roofline, WaitClock, bytes_of_a_token, measure_bandwidth
from hybrid_moe.cli.terminal import Steps, text_writer, token_writer

if TYPE_CHECKING:
    from hybrid_moe.integrations.transformers.serving.answers import Answer


def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    method: shared.MethodOption = None,
    dense: shared.DenseOption = o.DENSE,
    threads: shared.ThreadsOption = None,
    pools: shared.PoolsOption = None,
    gpu_experts: o.GpuExpertsOption = None,
    gpu_backend: o.GpuBackendOption = None,
    cpu_activation: o.CpuActivationOption = None,
    cache: o.CacheOption = None,
    draft: o.DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: o.SeedOption = 0,
) -> None:
    """Continue a prompt, with experts and linear layers on the CPU's kernels.

    The text goes to stdout; what is being done, and how fast it was, to stderr.
    """
    options = o.LoadOptions(
        method, dense, threads, pools, gpu_experts, gpu_backend, cpu_activation, cache
    )
    with Steps() as steps:
        opened = o.OpenedModel.open(model, steps)
        ids = opened.tokens(prompt)
        bandwidth = None
        if max_new_tokens > 1 and gpu_experts is None:  # before the memory is full
            steps.begin("measuring the memory")
            bandwidth = measure_bandwidth(options.workers())
        loaded = opened.load(options, steps)
        drafts = opened.load_draft(draft, loaded, options, steps)
        import torch

        from hybrid_moe.cpu_kernels.pool.group import group_for
        from hybrid_moe.integrations.transformers.hit_rates import hit_rates
        from hybrid_moe.integrations.transformers.serving.answers import Answerer

        before = hit_rates(loaded)
        torch.manual_seed(seed)
        steps.begin("first token")
        writer = token_writer(opened.tokenizer, text_writer())
        clock, waited_before = WaitClock(), 0.0
        started = False

        def on_token(token: int) -> None:
            nonlocal started, waited_before
            if not started:
                started, waited_before = True, clock.seconds
                steps.end()
            writer.put(torch.tensor([token]))

        with clock.on(group_for(options.workers())):
            answer = Answerer(loaded, drafts).answer(
                ids, o.sampling(loaded, max_new_tokens, temperature), on_token
            )
        writer.end()
        typer.echo("")
        steps.say(speeds(answer), "dim")
        if before is not None and (after := hit_rates(loaded)) is not None:
            steps.say((after - before).summary(), "dim")
        if bandwidth is not None and answer.decode_speed is not None:
            context = answer.prompt + len(answer.tokens) // 2
            try:
                nbytes = bytes_of_a_token(opened.path, method, dense, context)
            except ValueError as error:
                steps.say(f"no roofline: {error}", "dim")
                return
            waited = clock.seconds - waited_before
            steps.say(f"decode at {Roofline(bandwidth, nbytes).summary(answer, waited)}", "dim")


def speeds(answer: Answer) -> str:
    """Tokens per second of prefill (to the first token) and of decode (after it)."""
    read = answer.prompt - answer.reused
    text = f"prefill {read} tokens, {answer.prefill_speed:.1f} tok/s"
    if answer.decode_speed is not None:
        text += f"; decode {len(answer.times) - 1} tokens, {answer.decode_speed:.1f} tok/s"
    if answer.drafts is not None:
        drafts = answer.drafts
        text += f", {drafts.accepted} of {drafts.drafted} drafted ones right"
    return text
