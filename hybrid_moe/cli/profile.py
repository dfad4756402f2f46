"""`hybrid-moe profile`: measures the routing of a model on the user's texts; `profile show` draws
it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_moe.cli import machine_options as shared
from hybrid_moe.cli import model_options as o
from hybrid_moe.cli.errors import readable
from hybrid_moe.cli.models import WHAT
from hybrid_moe.cli.profile_show import show
from hybrid_moe.cli.terminal import Steps

if TYPE_CHECKING:
    from hybrid_moe.cli.profile_texts import Document
    from hybrid_moe.placement.routing_profile import RoutedModel, RoutingProfile

profile = typer.Typer(help="Measure which experts a model uses, and show it.")
profile.command()(readable(show))


@profile.callback(invoke_without_command=True)
@readable
def measure(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help=f"The model: {WHAT}.", metavar="MODEL", show_default=False)
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text: .txt, or .jsonl with text, prompt or messages in each line; or .pt, a dump "
            "of SGLang's expert distribution recorder. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profile that is written, .json.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are read, spread evenly over the texts.")
    ] = 16384,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 512,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that are generated after each prompt: decode.")
    ] = 32,
    method: shared.MethodOption = None,
    dense: shared.DenseOption = o.DENSE,
    threads: shared.ThreadsOption = None,
    pools: shared.PoolsOption = None,
    gpu_experts: o.GpuExpertsOption = None,
    gpu_backend: o.GpuBackendOption = None,
    cache: o.CacheOption = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Default: what the model's authors chose.")
    ] = None,
    seed: o.SeedOption = 0,
) -> None:
    """Measure which experts a model uses: your texts are read, and continued.

    Prompts are counted as prefill, what is generated after them as decode.
    """
    if context.invoked_subcommand is not None:
        return
    if model is None or not data or out is None:
        raise ValueError(
            "hybrid-moe profile needs --model MODEL --data FILE --out profile.json; "
            "hybrid-moe profile show FILE shows a profile"
        )
    _check_target(out)
    for path in data:
        path.stat()  # a missing file is an error now, not after minutes of loading
    dumps = [path for path in data if path.suffix == ".pt"]
    texts = [path for path in data if path.suffix != ".pt"]
    found = [_of_dumps(model, dumps)] if dumps else []
    if texts:
        options = o.LoadOptions(
            method, dense, threads, pools, gpu_experts, gpu_backend, None, cache
        )
        with Steps() as steps:
            run = _Run(model, texts, tokens, prompt, new_tokens, temperature, seed)
            found.append(run.measure(options, steps))
    from hybrid_moe.placement.routing_profile import together
    from hybrid_moe.placement.routing_profile_file import write_routing_profile

    made = together(found)
    write_routing_profile(out, made)
    typer.echo(_summary(made, out))


def _check_target(out: Path) -> None:
    """Raise what would keep the profile from being written, before it is measured."""
    if out.is_dir() or out.suffix != ".json":
        raise ValueError(f"--out {out} must be the name of a .json file")
    if not out.expanduser().absolute().parent.is_dir():
        raise FileNotFoundError(2, "the folder does not exist", str(out.parent))


def _of_dumps(model: str, dumps: list[Path]) -> RoutingProfile:
    from hybrid_moe.placement.routing_profile import together
    from hybrid_moe.placement.sglang_dump import read_sglang_dump

    described = _described(model)
    return together([read_sglang_dump(path, described) for path in dumps])


def _described(model: str) -> RoutedModel:
    """What a model's files say of its routing."""
    from hybrid_moe.loaders.find_model import find_model
    from hybrid_moe.placement.routing_profile import RoutedModel
    from hybrid_moe.planning.model import read_model

    found = read_model(find_model(model))
    return RoutedModel(
        found.family,
        found.hidden,
        max(layer.num_experts for layer in found.layers),
        found.top_k,
        tuple(layer.layer for layer in found.layers),
    )


class _Run:
    """Texts that a model reads and continues."""

    def __init__(
        self,
        model: str,
        texts: list[Path],
        tokens: int,
        prompt: int,
        new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> None:
        self._model, self._texts = model, texts
        self._prompt = min(prompt, tokens)
        self._count = -(-tokens // self._prompt)
        self._new_tokens, self._temperature, self._seed = new_tokens, temperature, seed

    def measure(self, options: o.LoadOptions, steps: Steps) -> RoutingProfile:
        """Load the model and let it read."""
        from hybrid_moe.cli.profile_texts import documents, pieces, spread

        steps.begin("reading the texts")
        parts = [pieces(documents(path), self._prompt) for path in self._texts]
        if not any(parts):
            raise ValueError(f"{self._texts[0]} has no text")
        chosen = spread([piece for part in parts for piece in part], self._count)
        opened = o.OpenedModel.open(self._model, steps)
        prompts = self._prompts(chosen, opened.tokenizer)
        loaded = opened.load(options, steps)
        return self._read(loaded, prompts, steps)

    def _prompts(self, chosen: list[Document], tokenizer: Any) -> list[list[int]]:
        from hybrid_moe.cli.profile_texts import prompt_ids

        prompts = [ids for piece in chosen if (ids := prompt_ids(piece, tokenizer, self._prompt))]
        if not prompts:
            raise ValueError(f"the tokenizer makes no token of {self._texts[0]}")
        return prompts

    def _read(self, loaded: Any, prompts: list[list[int]], steps: Steps) -> RoutingProfile:
        import torch
        from tqdm import tqdm

        from hybrid_moe.integrations.transformers.routing_hooks import recorded_routing
        from hybrid_moe.integrations.transformers.serving.answers import Answerer

        torch.manual_seed(self._seed)
        answerer = Answerer(loaded)
        steps.begin("reading and continuing", spin=False)
        with recorded_routing(loaded) as recorder:
            bar = tqdm(prompts, "reading", unit="prompt", disable=None)
            for ids in bar:
                # the last of the tokens that come out is not read by the model
                config = o.sampling(loaded, self._new_tokens + 1, self._temperature)
                answerer.answer(ids, config)
                answerer.forget()
            steps.end()
            return recorder.profile(", ".join(path.name for path in self._texts))


def _summary(made: RoutingProfile, out: Path) -> str:
    from hybrid_moe.placement.routing_profile import PHASES
    from hybrid_moe.text import format_bytes

    L, E = made.shape
    phases = ", ".join(
        f"{count} tokens of {phase}"
        for phase, count in zip(PHASES, made.tokens.tolist(), strict=True)
        if count
    )
    return (
        f"{out}: {phases or 'no tokens'} in {L} layers of {E} experts, "
        f"{format_bytes(out.stat().st_size)}; hybrid-moe profile show {out} shows it"
    )
