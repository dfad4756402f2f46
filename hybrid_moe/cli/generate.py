"""`hybrid-moe generate`: text from a model, streamed to the terminal, and its speed."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_moe.cli.models import ModelOption, blaming
from hybrid_moe.cli.terminal import Steps, console

if TYPE_CHECKING:
    from collections.abc import Callable

    from hybrid_moe.loaders import CheckpointSummary


def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    method: Annotated[
        str | None,
        typer.Option(help="Weight format of the experts; default: what the checkpoint stores."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Worker threads; default: one per available core.")
    ] = None,
    pools: Annotated[
        int | None, typer.Option(help="Worker pools; default: one per NUMA node.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Of the sampling, where temperature is above 0."),
    ] = 0,
) -> None:
    """Continue a prompt with the model's experts on the CPU.

    The text goes to stdout; what is being done, and how fast it was, to stderr.
    """
    with Steps() as steps:
        steps.begin("importing PyTorch and Transformers")
        import torch
        import transformers

        from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
        from hybrid_moe.cpu_kernels.pool.config import PoolConfig
        from hybrid_moe.integrations.transformers.registration import (
            check_directory,
            from_pretrained,
        )
        from hybrid_moe.loaders import inspect_checkpoint

        if not steps.console.is_terminal:
            transformers.utils.logging.disable_progress_bar()
        steps.begin("reading the configuration")
        path = check_directory(model)
        choose_tier()  # a wrong HYBRID_MOE_ISA is an error before minutes of loading, not after
        summary = inspect_checkpoint(path)
        with blaming(f"{path} could not be loaded"):
            tokenizer, inputs = tokenize(path, prompt)
            steps.begin("loading the model", spin=False)  # which shows bars of its own
            loaded = from_pretrained(path, method=method, threads=threads, pools=pools)
        workers = PoolConfig.choose(threads, pools).threads
        # PyTorch counts processors, whatever a cgroup's quota says of their time
        torch.set_num_threads(threads or min(workers, torch.get_num_threads()))
        steps.begin("compiling kernels")
        with torch.inference_mode():
            loaded(input_ids=inputs["input_ids"][:, :1])
        steps.end()
        steps.say(f"{headline(model, summary, loaded)}; ready in {steps.seconds:.1f} s", "bold")
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling["temperature"] = temperature
        steps.begin("first token")
        clock = streamer_class()(tokenizer, text_writer(), steps.end)
        with torch.inference_mode():
            loaded.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                streamer=clock,
                pad_token_id=pad_token(tokenizer),
                **sampling,
            )
        typer.echo("")
        steps.say(clock.summary(inputs["input_ids"].shape[1]), "dim")


def headline(model: str, summary: CheckpointSummary, loaded: Any) -> str:
    """What runs, in one line: the model, its experts, their format, the tier and the threads."""
    from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts

    experts = [module for module in loaded.modules() if isinstance(module, HybridExperts)]
    first = next(module.layer for module in experts if module.layer is not None)
    per_token = summary.experts_per_token or "an unknown number"
    threads, pools = first.pool.threads, first.pool.pools
    return (
        f"{model}: {summary.model_type}, {len(experts)} layers of {first.num_experts} experts, "
        f"{per_token} per token, {first.fmt.name}; tier {first.tier.name}; "
        f"{threads} thread{'s' * (threads > 1)}" + (f" in {pools} pools" if pools > 1 else "")
    )


def text_writer() -> Callable[[str], None]:
    """Writes pieces of the answer to stdout: in colour on a terminal, else as they are."""
    screen = console()
    if not screen.is_terminal:
        return lambda text: typer.echo(text, nl=False)
    from rich.text import Text

    return lambda text: screen.print(Text(text, "green"), end="", soft_wrap=True)


def tokenize(model: Path, prompt: str) -> tuple[Any, Any]:
    """The checkpoint's tokenizer, and the prompt as its tokens.

    Raises:
        ValueError: no usable tokenizer, or the prompt has no tokens.
    """
    import transformers

    if not prompt:
        raise ValueError("the prompt is empty: give at least one token to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is no valid UTF-8") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer in {model} cannot be loaded: {error}") from error
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(
            f"the tokenizer in {model} makes no token of the prompt; are its files "
            "(tokenizer.json, tokenizer_config.json) there?"
        )
    return tokenizer, inputs


def pad_token(tokenizer: Any) -> int:
    """An id for padding: one prompt needs none, but Transformers warns where there is none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def streamer_class() -> type[Any]:
    """Transformers' text streamer with a clock (a function, so that `--help` imports nothing)."""
    from transformers import TextStreamer

    class ClockedStreamer(TextStreamer):  # type: ignore[misc]
        """Gives finished words to `write` and notes when tokens arrive; `begin` is called before
        the first one is written."""

        def __init__(
            self, tokenizer: Any, write: Callable[[str], None], begin: Callable[[], None]
        ) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.write = write
            self.begin = begin
            self.times: list[float] = []  # of the prompt, then of each token

        def put(self, value: Any) -> None:
            self.times.append(perf_counter())
            if len(self.times) == 2:  # the first is the prompt
                self.begin()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.write(text)

        def summary(self, prompt_tokens: int) -> str:
            """Tokens per second of prefill (to the first token) and of decode (after it)."""
            start, first, last = self.times[0], self.times[1], self.times[-1]
            decoded = len(self.times) - 2
            speeds = [
                f"prefill {prompt_tokens} tokens, {prompt_tokens / (first - start):.1f} tok/s"
            ]
            if decoded:
                speeds.append(f"decode {decoded} tokens, {decoded / (last - first):.1f} tok/s")
            return "; ".join(speeds)

    return ClockedStreamer
