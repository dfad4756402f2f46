"""Families through dense layers here against plain Transformers: logits, tokens, experts chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from tests.families import write_family
from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.integrations.dense.wide_models import WIDE, build_wide
from tests.hybrid_moe.integrations.loading_cases import hybrid_experts, load, plain
from tests.hybrid_moe.tiny_models import greedy, logits

ROUNDINGS = 12
"""Of BF16 in a layer, that one side makes and the other makes elsewhere or not: each linear layer's
output, whose float32 sum is in another order (q, k, v, o and two of latent attention: 6); of the
dense or shared MLP gate, up and their product (3), which are rounded once here; and as many of the
experts."""

PROMPT = torch.arange(12)[None] * 7 % 90


def tolerance(expected: torch.Tensor, layers: int) -> float:
    """A rounding is 2^-8 of a value at most; errors of hidden states that are normalised add up
    to what as many errors of the largest logit would be. The output layer rounds once more."""
    return float((ROUNDINGS * layers + 1) * 2.0**-8 * expected.abs().max())


Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a family's checkpoint, of `WIDE` or of `tests.families`."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            place = tmp_path_factory.mktemp(family)
            if family in WIDE:
                folders[family] = save(build_wide(family), place)
            else:
                folders[family] = write_family(family.removeprefix("narrow "), place).directory
        return folders[family]

    return get


NARROW = ("mixtral", "minimax_m2", "deepseek_v4")
"""Of `tests.families`: with layers that are too small to be taken beside those that are."""


@pytest.mark.parametrize("family", [*WIDE, *(f"narrow {name}" for name in NARROW)])
def test_logits_and_the_experts_that_are_chosen(family: str, folder: Folder) -> None:
    """Routers are torch's, so on the same hidden states they choose the same experts."""
    model, reference = load(folder(family)), plain(folder(family))
    assert any(isinstance(m, HybridLinear) for m in model.modules())
    blocks: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            blocks.append((name, args[0].detach().clone(), args[1].detach().clone()))

        return hook

    chosen: list[torch.Tensor] = []
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for name, module in model.named_modules():
        if module in list(hybrid_experts(model)):
            module.register_forward_pre_hook(note(name))
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
            )
    result = logits(model, PROMPT)
    expected = logits(reference, PROMPT)
    allowed = tolerance(expected, reference.config.num_hidden_layers)
    assert (result - expected).abs().max() <= allowed
    for (name, _, ids), (args, kwargs) in zip(blocks, inputs, strict=True):
        experts = reference.get_submodule(name)
        handle = experts.register_forward_pre_hook(
            lambda _, args: chosen.append(args[1].detach().clone())
        )
        with torch.no_grad():
            reference.get_submodule(name.rpartition(".")[0])(*args, **kwargs)
        handle.remove()
        assert torch.equal(chosen.pop().sort().values, ids.sort().values)
    assert blocks


@pytest.mark.parametrize("family", ["deepseek_v4", "qwen3_next"])
def test_logits_to_keep_and_batches(family: str, folder: Folder) -> None:
    model = load(folder(family))
    whole = logits(model, PROMPT)
    with torch.no_grad():
        last = model(input_ids=PROMPT, logits_to_keep=2).logits[0].float()
        both = model(input_ids=PROMPT.repeat(2, 1)).logits.float()
    assert torch.equal(last, whole[-2:])
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_generation(family: str, folder: Folder) -> None:
    """With a cache the same tokens as without; beams of one are greedy; sampling runs."""
    model = load(folder(family))
    tokens = greedy(model, PROMPT, 5)
    for number in range(5):
        ids = torch.cat([PROMPT, torch.tensor([tokens[:number]], dtype=torch.int64)], dim=1)
        scores = logits(model, ids)[-1]
        best = scores.max() - scores[tokens[number]]
        assert best <= tolerance(scores, 2)
    options = {
        "attention_mask": torch.ones_like(PROMPT), "pad_token_id": 0, "max_new_tokens": 4,
        "min_new_tokens": 4,
    }  # fmt: skip
    with torch.no_grad():
        beams = model.generate(PROMPT, num_beams=3, num_return_sequences=3, **options)
        sampled = model.generate(PROMPT, do_sample=True, **options)
    assert beams.shape == (3, 16) and sampled.shape == (1, 16)
    assert len({tuple(beam.tolist()) for beam in beams}) == 3


def test_compiled_without_a_break(folder: Folder) -> None:
    model = load(folder("qwen3_moe"))
    model.set_attn_implementation("sdpa")  # which is what a graph has, see `attention_forward`
    expected = logits(model, PROMPT)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        result = compiled(input_ids=PROMPT, use_cache=False).logits[0].float()
    assert torch.equal(result, expected)
