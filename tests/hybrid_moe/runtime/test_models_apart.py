"""Which layers defer to which, in values: no model adds another's experts, and none are lost."""

from __future__ import annotations

import gc
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hybrid_moe.runtime import construction_order
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, H, K, Weights, wrapper
from tests.reference import BF16_ROUNDOFF, Evaluation, added, assert_within

DEFERRED = 2


@dataclass
class Loaded:
    """A wrapper with the weights of its own that it was given."""

    wrapper: KTMoEWrapper
    weights: Weights
    deferred: int

    def parts(self, batch: Batch) -> tuple[Evaluation, Evaluation]:
        """What may be asked of the layer now, and what later."""
        now, later = split_deferred(batch.ids, batch.weights, K - self.deferred, E)
        return tuple(
            self.weights.expected(Batch(batch.hidden, i, batch.weights)) for i in (now, later)
        )  # type: ignore[return-value]


def layer(index: int, deferred: int, seed: int | None = None, **arguments: Any) -> Loaded:
    w = wrapper(layer_idx=index, max_deferred_experts_per_token=deferred, **arguments)
    weights = Weights.random(seed=100 + index if seed is None else seed)
    return Loaded(weights.load(w), weights, deferred)


def step(layers: list[Loaded], deferring: bool, tokens: int = 3, seed: int = 0) -> None:
    """One step through `layers`: every output has exactly its own experts and, where `deferring`,
    those that the layer before has deferred instead of its own deferred ones."""
    carried: list[Evaluation] = []
    for at, one in enumerate(layers):
        batch = Batch.random(tokens, seed=10 * seed + at)
        last = at == len(layers) - 1
        if deferring and one.deferred and not last:
            now, later = one.parts(batch)
        else:
            now, later = one.weights.expected(batch), None
        y = one.wrapper.forward(*batch.args)
        assert_within(y.double().numpy(), added(now, *carried) if carried else now)
        carried = [later] if later is not None else []


def alternate(models: list[list[Loaded]], deferring: list[bool]) -> None:
    """Steps of all models in turns, with one number of tokens: nothing else tells them apart."""
    for seed in range(2):
        for model, does in zip(models, deferring, strict=True):
            step(model, does, seed=seed)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(construction_order, "_told", set())


# Declared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["one_by_one", "in_turns", "backwards"])
def test_declared_models_do_not_mix(order: str, tmp_path: Path) -> None:
    """Two copies of one checkpoint, whose layers differ in nothing but the chain."""
    chains = [DeferralChain(), DeferralChain()]
    places = [(model, index) for model in (0, 1) for index in (0, 2, 3)]
    if order == "in_turns":
        places.sort(key=lambda place: place[1])
    elif order == "backwards":
        places.reverse()
    made = {
        (model, index): layer(
            index, DEFERRED, seed=10 * model + index, weight_path=tmp_path,
            deferral_chain=chains[model],
        )
        for model, index in places
    }  # fmt: skip
    models = [[made[model, index] for index in (0, 2, 3)] for model in (0, 1)]
    alternate(models, [True, True])


def test_a_draft_layer_beside_a_declared_model() -> None:
    chain = DeferralChain()
    main = [layer(i, DEFERRED, deferral_chain=chain) for i in range(2)]
    drafts = [[layer(2, 0)], [layer(2, DEFERRED)], [layer(0, DEFERRED)]]
    alternate([main, *drafts], [True, False, False, False])


def test_layers_of_a_declared_model_come_and_go() -> None:
    chain = DeferralChain()
    main = [layer(i, DEFERRED, deferral_chain=chain) for i in range(4)]
    step(main, True)
    main[1].wrapper.close()
    step([main[0], *main[2:]], True)
    main[1] = layer(1, DEFERRED, seed=50, deferral_chain=chain)
    step(main, True)
    del main[2]
    gc.collect()
    step(main, True)
    main.insert(2, layer(2, DEFERRED, seed=51, deferral_chain=chain))
    step(main, True)
    main[0].wrapper.forward(*Batch.random(3).args)  # a step that ends here
    main[1].wrapper.close()
    main[1] = layer(1, DEFERRED, seed=52, deferral_chain=chain)
    step(main, True)


def test_a_layer_without_weights_is_passed_over() -> None:
    chain = DeferralChain()
    first, last = layer(0, DEFERRED, deferral_chain=chain), layer(2, 0, deferral_chain=chain)
    empty = wrapper(layer_idx=1, deferral_chain=chain)
    step([first, last], True)
    Weights.random(seed=7).load(empty)
    step([first, Loaded(empty, Weights.random(seed=7), 0), last], True)


def test_what_a_chain_refuses() -> None:
    chain = DeferralChain()
    kept = layer(0, DEFERRED, deferral_chain=chain)
    with pytest.raises(ValueError, match="has a layer 0 already: close it first"):
        wrapper(layer_idx=0, deferral_chain=chain)
    with pytest.raises(ValueError, match="hidden_size is 96, but layer 0"):
        wrapper(layer_idx=1, hidden_size=96, deferral_chain=chain)
    with pytest.raises(TypeError, match=r"must be a hybrid_moe\.DeferralChain or None, not str"):
        wrapper(layer_idx=1, deferral_chain="model")
    step([kept], True)


# By kt-kernel's contract ------------------------------------------------------------------------


def test_layers_of_a_checkpoint_up_to_one_without_deferral_are_a_model(tmp_path: Path) -> None:
    models = [
        [layer(i, n, weight_path=tmp_path) for i, n in ((0, DEFERRED), (2, DEFERRED), (3, 0))]
        for _ in range(2)
    ]
    draft = [layer(4, 0, weight_path=tmp_path)]
    alternate([*models, draft], [True, True, False])


def test_models_of_several_checkpoints_may_be_constructed_in_turns(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    models: list[list[Loaded]] = [[], []]
    for index, deferred in ((0, DEFERRED), (1, DEFERRED), (2, 0)):
        for at, folder in enumerate(folders):
            folder.mkdir(exist_ok=True)
            models[at].append(layer(index, deferred, seed=20 * at + index, weight_path=folder))
    alternate(models, [True, True])


def test_weights_from_tensors_say_nothing_about_models(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        models = [[layer(i, n, seed=20 * m + i) for i, n in ((0, 2), (1, 0))] for m in range(2)]
        alternate(models, [False, False])
    (told,) = caplog.messages
    assert "defer nothing: their weights are not from a checkpoint" in told
    assert "the same deferral_chain=hybrid_moe.DeferralChain()" in told


def test_copies_of_a_checkpoint_constructed_in_turns_defer_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models: list[list[Loaded]] = [[], []]
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        for index, deferred in ((0, DEFERRED), (1, DEFERRED), (2, 0)):
            for at, model in enumerate(models):
                model.append(layer(index, deferred, seed=20 * at + index, weight_path=tmp_path))
        alternate(models, [False, False])
    assert sum("constructed out of order" in message for message in caplog.messages) == 1
    for model in models:
        for one in model:
            one.wrapper.close()
    again = [layer(i, n, weight_path=tmp_path) for i, n in ((0, DEFERRED), (1, 0))]
    alternate([again], [True])


def test_copies_whose_first_layers_are_gone(tmp_path: Path) -> None:
    """What is left of two copies in turns still is not one model."""
    first = [layer(0, DEFERRED, seed=1, weight_path=tmp_path)]
    second = [layer(0, DEFERRED, seed=2, weight_path=tmp_path)]
    first.clear()
    gc.collect()
    first.append(layer(1, DEFERRED, seed=3, weight_path=tmp_path))
    second.append(layer(2, 0, seed=4, weight_path=tmp_path))
    alternate([first, second], [False, False])


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(
    "config", [None, {}, {"num_hidden_layers": 2}, {"text_config": {"num_hidden_layers": 2}}]
)
def test_a_draft_layer_does_not_end_a_model(
    tmp_path: Path, config: dict[str, Any] | None, ran: bool
) -> None:
    """A main model that nothing has ended, and a draft layer with the next index. Whether the
    model has run or the configuration counts its layers, the draft layer is not of it."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    main = [layer(i, DEFERRED, weight_path=tmp_path) for i in range(2)]
    if ran:
        step(main, False)
    draft = layer(2, 0, weight_path=tmp_path)
    if ran or config:
        alternate([main, [draft]], [False, False])
    else:  # by the contract these are three layers of one model
        alternate([[*main, draft]], [True])


@pytest.mark.parametrize("text", ["{", "[]", '{"num_hidden_layers": "two"}'])
def test_a_configuration_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    alternate([[layer(i, n, weight_path=tmp_path) for i, n in ((0, DEFERRED), (1, 0))]], [True])


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_model_that_lost_a_layer_defers_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The layer in its place is of no known model: what was deferred past it would come two layers
    late, though nobody declared that."""
    main = [layer(i, n, weight_path=tmp_path) for i, n in ((0, DEFERRED), (1, DEFERRED), (2, 0))]
    step(main, True)
    if how == "closed":
        main[1].wrapper.close()
    main[1] = layer(1, 0, seed=9, weight_path=tmp_path)
    gc.collect()
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        step(main, False)
    (told,) = caplog.messages
    assert "defer nothing: a layer of their model has been closed or dropped since" in told


def test_threads_that_construct_models_at_once(tmp_path: Path) -> None:
    """Each builds one copy; whatever the order, no copy adds another's experts."""
    models: list[list[Loaded]] = [[], [], []]
    start = threading.Barrier(len(models))

    def build(at: int) -> None:
        start.wait()
        for index, deferred in ((0, DEFERRED), (1, DEFERRED), (2, 0)):
            models[at].append(layer(index, deferred, seed=20 * at + index, weight_path=tmp_path))

    threads = [threading.Thread(target=build, args=(at,)) for at in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        for model in models:
            batches = [Batch.random(3, seed=10 * seed + at) for at in range(3)]
            outputs = [m.wrapper.forward(*b.args) for m, b in zip(model, batches, strict=True)]
            own = [m.weights.expected(b) for m, b in zip(model, batches, strict=True)]
            total = sum(y.double().numpy() for y in outputs)
            bound = added(*own)
            slack = sum(BF16_ROUNDOFF * abs(y.double().numpy()) for y in outputs)
            assert (abs(total - bound.value) <= bound.bound + slack).all()
    assert models[0][0].wrapper.hidden_size == H
