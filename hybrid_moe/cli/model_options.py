"""What `generate`, `chat` and `serve` share: the model, and how it is loaded."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_moe.cli.models import blaming
from hybrid_moe.cli.terminal import Steps

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig
    from hybrid_moe.loaders import CheckpointSummary

DENSE = "bf16"
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling, where tokens are drawn.")
]
GpuExpertsOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|MEMORY|PROFILE",
        help="Experts for a GPU: 25%, as many as fit into 24GB, a placement profile, or by a "
        "routing profile: profile.json@25%.",
    ),
]
GpuBackendOption = Annotated[
    str | None,
    typer.Option(
        metavar="cute|torch",
        help="What computes them; torch needs no GPU. Default: cute where it can be used.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that keeps the packed experts, as large as the model's: the next start reads "
        "them as they are.",
    ),
]
DynamicOption = Annotated[
    str | None,
    typer.Option(
        metavar="1|BYTES[,keep]",
        help="Experts on the GPU follow the text: at most so many bytes move in a second (1: 1GB).",
    ),
]
CpuActivationOption = Annotated[
    str | None,
    typer.Option(
        metavar="int8",
        help="Multiply experts of integer weights by inputs of 8 bits: faster prompts, less exact.",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|prompt",
        help="What drafts tokens, as many at a time as pay: a smaller model with the same "
        "tokenizer, or the prompt, where the last words were before. The text stays the same.",
    ),
]
LONGEST_CONTEXT = 32768
"""Tokens, where nobody asks for another context: longer prompts take a CPU many minutes."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded: see `from_pretrained`."""

    method: str | None
    dense: str
    threads: int | None
    pools: int | None
    gpu_experts: str | None = None
    gpu_backend: str | None = None
    cpu_activation: str | None = None
    cache: Path | None = None
    dynamic: str | None = None

    def workers(self) -> PoolConfig:
        """The threads that work.

        Raises:
            ValueError: this machine cannot have them.
        """
        from hybrid_moe.cpu_kernels.pool.config import PoolConfig

        return PoolConfig.choose(self.threads, self.pools)


@dataclass(frozen=True)
class OpenedModel:
    """A model before its weights are loaded.

    Attributes:
        name: as the user gave it. path: its folder.
        summary: of its checkpoint.
        tokenizer: Transformers'.
    """

    name: str
    path: Path
    summary: CheckpointSummary
    tokenizer: Any

    @classmethod
    def open(cls, name: str, steps: Steps) -> OpenedModel:
        """Read the configuration and the tokenizer; imports what loading needs.

        Raises:
            ValueError: no usable tokenizer, or an unknown HYBRID_MOE_ISA: errors before minutes of
                loading, not after.
            FileNotFoundError, CheckpointError: see `check_directory` and `inspect_checkpoint`.
        """
        steps.begin("importing PyTorch and Transformers")
        import transformers

        from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
        from hybrid_moe.integrations.transformers.gguf_model import read_tokenizer
        from hybrid_moe.integrations.transformers.registration import check_directory
        from hybrid_moe.loaders import inspect_checkpoint
        from hybrid_moe.loaders.gguf.gguf_layers import is_gguf

        if not steps.console.is_terminal:
            transformers.utils.logging.disable_progress_bar()
        steps.begin("reading the configuration")
        path = check_directory(name)
        choose_tier()
        summary = inspect_checkpoint(path)
        with blaming(f"{path} could not be loaded"):
            try:
                tokenizer = (
                    read_tokenizer(path)
                    if is_gguf(path)
                    else transformers.AutoTokenizer.from_pretrained(path)
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"the tokenizer in {path} cannot be loaded: {error}") from error
        return cls(name, path, summary, tokenizer)

    @property
    def served_name(self) -> str:
        """What requests call the model: its id, or the name of its folder or file."""
        return self.path.name if Path(self.name).exists() else self.name

    def need_fast_tokenizer(self) -> None:
        """Raise `ValueError` for a tokenizer that cannot decode token by token."""
        if not hasattr(self.tokenizer, "_tokenizer"):
            raise ValueError(
                f"the tokenizer in {self.path} has no tokenizer.json, which answers are decoded by"
            )

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            ValueError: it has none.
        """
        if not text:
            raise ValueError("the prompt is empty: give at least one token to continue")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt is no valid UTF-8") from None
        with blaming(f"{self.path} could not be loaded"):
            tokens: list[int] = self.tokenizer(text)["input_ids"]
        if not tokens:
            raise ValueError(
                f"the tokenizer in {self.path} makes no token of the prompt; are its files "
                "(tokenizer.json, tokenizer_config.json) there?"
            )
        return tokens

    def load(self, options: LoadOptions, steps: Steps) -> Any:
        """The model, ready to generate; says what runs.

        Raises:
            FileNotFoundError, TypeError, ValueError, CheckpointError, NotImplementedError: see
                `from_pretrained`.
        """
        import torch

        from hybrid_moe.integrations.transformers.registration import from_pretrained

        with blaming(f"{self.path} could not be loaded"):
            steps.begin("loading the model", spin=False)  # which shows bars of its own
            model = from_pretrained(self.path, **asdict(options))
        threads, workers = options.threads, options.workers().threads
        # PyTorch counts processors, whatever a cgroup's quota says of their time
        torch.set_num_threads(threads or min(workers, torch.get_num_threads()))
        steps.begin("compiling kernels")
        with torch.inference_mode():
            model(input_ids=torch.tensor([[0]], device=model.device))
        steps.end()
        steps.say(
            f"{self._headline(model, options.workers())}; ready in {steps.seconds:.1f} s", "bold"
        )
        return model

    def load_draft(self, name: str | None, model: Any, options: LoadOptions, steps: Steps) -> Any:
        """What drafts tokens for `model`, as `Answerer` takes it; None for nothing.

        Raises:
            FileNotFoundError, ValueError, CheckpointError, NotImplementedError: see
                `draft_model.load_draft`.
        """
        from hybrid_moe.integrations.transformers.draft_model import load_draft
        from hybrid_moe.integrations.transformers.serving.answers import FROM_PROMPT

        if name is None or name == FROM_PROMPT:
            return name
        with blaming(f"the draft {name} could not be loaded"):
            steps.begin("loading the draft", spin=False)
            draft = load_draft(name, model, options.threads, options.pools, options.dense)
        steps.end()
        return draft

    def context(self, asked: int | None) -> int:
        """Tokens that a prompt and its answer may have together.

        Raises:
            ValueError: more than the model was made for.
        """
        from hybrid_moe.loaders import Checkpoint

        longest = Checkpoint.open(self.path).model.full.get("max_position_embeddings")
        if asked is None:
            return min(longest or LONGEST_CONTEXT, LONGEST_CONTEXT)
        if longest is not None and asked > longest:
            raise ValueError(f"--context {asked}: the model was made for {longest} tokens")
        return asked

    def _headline(self, model: Any, pool: PoolConfig) -> str:
        """What runs, in one line: the model, its experts, their format, tier and threads."""
        from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
        from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
        from hybrid_moe.integrations.transformers.split_experts import SplitExperts

        experts = [module for module in model.modules() if isinstance(module, HybridExperts)]
        first = experts[0]
        per_token = self.summary.experts_per_token or "an unknown number"
        line = (
            f"{self.name}: {self.summary.model_type}, {len(experts)} layers of "
            f"{first.spec.num_experts} experts, {per_token} per token, "
            f"{first.formats.name if first.formats else 'not loaded'}; tier {choose_tier().name}; "
            f"{pool.threads} thread{'s' * (pool.threads > 1)}"
            + (f" in {pool.pools} pools" if pool.pools > 1 else "")
        )
        split = [e.layer for e in experts if isinstance(e.layer, SplitExperts)]
        if split:
            hot = sum(layer.wrapper.num_gpu_experts for layer in split)
            line += f"; {hot} experts on {split[0].device} by {split[0].backend}"
        return line


def sampling(model: Any, max_new_tokens: int, temperature: float | None) -> Any:
    """A `GenerationConfig`: the model's own, with these.

    Args:
        max_new_tokens: of the answer, at most.
        temperature: 0 takes the likeliest token; None leaves the choice to the model's authors.
    """
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = max_new_tokens
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = temperature or None
        if not config.do_sample:
            config.top_k = config.top_p = None  # else Transformers warns that they do nothing
    if config.pad_token_id is None:
        config.pad_token_id = 0  # one prompt needs no padding, but Transformers warns
    return config
