"""Random use of the wrappers of one model: steps that succeed, fail, are given up, and layers that
come and go, each compared with the oracle."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.wrapper import KTMoEWrapper
from tests.fuzz.generate import Call, Sizes, Weights, save
from tests.fuzz.oracle import Expected, Layer, Oracle
from tests.reference import assert_within


class InjectedError(Exception):
    """What a test lets happen inside a submission."""


class Model:
    """One model and its user.

    Args:
        rng: where everything random comes from.
        folder: an empty folder of its own.
        cores: worker threads at most.
        calls: counts what was done, by kind.
    """

    def __init__(self, rng: random.Random, folder: Path, cores: int, calls: Counter[str]) -> None:
        self.rng, self.calls = rng, calls
        self.sizes = Sizes.random(rng, cores)
        self.kind = rng.choice(("declared", "declared", "checkpoint", "tensors", "tensors"))
        self.oracle = Oracle(self.sizes, self.kind == "declared")
        self.chain = DeferralChain() if self.kind == "declared" else None
        indices = sorted(rng.sample(range(9), rng.randint(1, 4)))
        k = self.sizes.k
        deferred = [rng.choice((0, 0, rng.randint(0, k))) for _ in indices]
        self.folder: Path | None = None
        if (
            self.kind == "checkpoint"
        ):  # kt-kernel's contract: 0 ends a model, and only the last is 0
            deferred = [rng.randint(1, k) for _ in indices[1:]] + [0]
            self.folder = folder
        made = {index: Weights(rng, self.sizes, 0 if self.folder else 2) for index in indices}
        self.from_files = self.folder is not None and self.sizes.method == "MXFP4"
        self.from_files = self.from_files and not any(w.bias for w in made.values())
        if self.from_files:
            save(folder, made)
        for index, count in zip(indices, deferred, strict=True):
            self.add(index, count, made[index], first=True)

    def add(self, index: int, deferred: int, weights: Weights, first: bool = False) -> None:
        """Construct and load a layer. A model by a checkpoint has its layers from the beginning:
        one that is made later is of no chain."""
        sizes, rng = self.sizes, self.rng
        linked = self.chain is not None or (self.folder is not None and first)
        mask = torch.tensor([rng.random() < 0.2 for _ in range(sizes.E)])
        strict = rng.random() < 0.2
        wrapper = KTMoEWrapper(
            index,
            sizes.E,
            sizes.k,
            sizes.H,
            weights.I,
            mask if rng.random() < 0.9 or bool(mask.any()) else None,
            sizes.threads,
            sizes.pools,
            self.folder,
            max_deferred_experts_per_token=deferred,
            method=sizes.method,
            swiglu_limit=sizes.limit,
            swiglu_alpha=sizes.alpha,
            strict=strict,
            isa=sizes.isa,
            deferral_chain=self.chain,
        )
        if first and self.from_files:
            wrapper.load_weights(weights.mapping)
        else:
            weights.load(wrapper)
        resident, seen = ~mask.numpy(), mask.numpy().copy()
        layer = Layer(index, wrapper, weights, deferred, strict, linked, resident, seen)
        self.oracle.layers[index] = layer

    # What a user does -----------------------------------------------------------------------------

    def act(self) -> None:
        """One random thing."""
        rng = self.rng
        if not self.oracle.layers:
            self.renew()
            return
        what = rng.random()
        if what < 0.80:
            self.step()
        elif what < 0.90:
            self.single()
        elif what < 0.93:
            self.retire(rng.choice(list(self.oracle.layers.values())))
        elif what < 0.97:
            self.renew()
        else:
            layer = rng.choice(list(self.oracle.layers.values()))
            layer.wrapper.reset()
            self.oracle.reset(layer)
            self.calls["reset"] += 1

    def step(self) -> None:
        """All layers in order, perhaps given up somewhere between."""
        tokens = Call.random(self.rng, self.sizes).tokens
        giving_up = self.rng.random() < 0.12
        for layer in list(self.oracle.layers.values()):
            self.change_mask(layer)
            if giving_up and self.rng.random() < 0.3:
                return  # before this layer
            call = Call.random(self.rng, self.sizes, tokens)
            if giving_up and self.rng.random() < 0.3:
                self.submit(layer, call)  # and never a sync
                return
            if self.rng.random() < 0.04:
                self.malformed(layer, call)
            if self.rng.random() < 0.03:
                self.fail(layer, call)
            else:
                self.forward(layer, call)

    def single(self) -> None:
        """One layer, out of order or not, in any state."""
        layer = self.rng.choice(list(self.oracle.layers.values()))
        call = Call.random(self.rng, self.sizes)
        what = self.rng.randrange(5)
        if what == 0:
            self.submit(layer, call)
        elif what == 1:
            self.sync(layer)
        elif what == 2:
            self.malformed(layer, call)
        elif what == 3:
            self.change_mask(layer, often=True)
        else:
            self.forward(layer, call)

    def change_mask(self, layer: Layer, often: bool = False) -> None:
        """Live, in place or by assignment; sometimes what was never loaded loses the GPU."""
        rng = self.rng
        if not often and rng.random() < 0.85:
            return
        mask = layer.wrapper.gpu_experts_mask
        if rng.random() < 0.7:  # what a runtime may do: loaded experts come and go
            wanted = [
                bool(m) if not r else rng.random() < 0.3
                for m, r in zip(mask, layer.resident, strict=True)
            ]
            wanted = [w or not r for w, r in zip(wanted, layer.resident, strict=True)]
        else:
            wanted = [rng.random() < 0.5 for _ in layer.resident]
        if rng.random() < 0.5:
            layer.wrapper.gpu_experts_mask = torch.tensor(wanted)
        else:
            mask.copy_(torch.tensor(wanted))
        layer.mask = layer.wrapper.gpu_experts_mask.numpy().copy()

    def forward(self, layer: Layer, call: Call) -> None:
        """Submit and sync, or both in one."""
        if self.rng.random() < 0.5:
            if self.submit(layer, call):
                if self.rng.random() < 0.1:
                    self.change_mask(layer, often=True)
                self.sync(layer)
            return
        error = self.oracle.refused(layer) or self.oracle.mismatched(layer, call.tokens)
        self.calls["calls"] += 1
        if error is not None:
            self.raises(error, lambda: layer.wrapper.forward(*call.args))
            return
        self.oracle.submitted(layer, call)
        self.finish(layer, lambda: layer.wrapper(*call.args))

    def submit(self, layer: Layer, call: Call) -> bool:
        """Submit a copy of the call, whose memory is used for something else at once; whether it
        was accepted."""
        error = self.oracle.refused(layer) or self.oracle.mismatched(layer, call.tokens)
        self.calls["calls"] += 1
        given = call.clone()
        if error is not None:
            self.raises(error, lambda: layer.wrapper.submit_forward(*given.args))
            return False
        self.oracle.submitted(layer, call)
        layer.wrapper.submit_forward(*given.args)
        given.clobber()
        return True

    def sync(self, layer: Layer) -> None:
        """Collect what was submitted, or the error of having submitted nothing."""
        promise, w = layer.promise, layer.wrapper
        if promise is None:
            nothing = torch.zeros(1, self.sizes.H, dtype=torch.bfloat16)
            self.raises((RuntimeError, "has no submission"), lambda: w.sync_forward(nothing))
            return
        if self.rng.random() < 0.1:
            other = torch.zeros(promise.call.tokens + 1, self.sizes.H, dtype=torch.bfloat16)
            self.raises((ValueError, "was submitted"), lambda: w.sync_forward(other))
        self.finish(layer, lambda: w.sync_forward(promise.call.hidden))

    def finish(self, layer: Layer, collect: Callable[[], torch.Tensor]) -> None:
        """Compare what `collect` gives with the layer's promise."""
        promise, layer.promise = layer.promise, None
        assert promise is not None
        if promise.fault is not None:
            self.raises(promise.fault, collect)
        else:
            assert promise.value is not None
            output = collect()
            assert output.dtype == torch.bfloat16
            assert output.data_ptr() != promise.call.hidden.data_ptr() or not output.numel()
            assert_within(output.double().numpy(), promise.value, random=promise.random)
            self.calls["compared"] += 1
        if promise.fault is None or promise.fault[0] is IndexError:
            assert layer.wrapper.ignored_ids == layer.counted
        layer.counted = layer.wrapper.ignored_ids

    def malformed(self, layer: Layer, call: Call) -> None:
        """Arguments that are refused before anything happens; what is under way stays so."""
        hidden, ids, weights = call.args
        wrong: tuple[tuple[tuple[Any, ...], type[Exception], str], ...] = (
            ((hidden.float(), ids, weights), TypeError, "hidden_states has dtype"),
            ((hidden, ids.float(), weights), TypeError, "topk_ids has dtype"),
            ((hidden, ids, weights.to(torch.int64)), TypeError, "topk_weights has dtype"),
            ((hidden[:, :-1], ids, weights), ValueError, "hidden_states has shape"),
            ((hidden, ids[:, :-1], weights), ValueError, "topk_ids has shape"),
            (
                (hidden, ids, torch.cat([weights, weights])[: len(hidden) + 1]),
                ValueError,
                "topk_weights has shape",
            ),
            (("hidden", ids, weights), TypeError, "must be a tensor"),
        )
        arguments, kind, message = self.rng.choice(wrong)
        if len(hidden) == 0 and "topk_weights has shape" in message:
            return  # none is still none
        error: Expected = (kind, message)
        if layer.promise is not None:
            error = self.oracle.refused(layer) or error
        call_it = self.rng.choice((layer.wrapper.submit_forward, layer.wrapper.forward))
        self.raises(error, lambda: call_it(*arguments))
        self.calls["malformed"] += 1

    def fail(self, layer: Layer, call: Call) -> None:
        """Something goes wrong inside a submission, such as memory that is not there."""
        error = self.oracle.refused(layer) or self.oracle.mismatched(layer, call.tokens)
        experts: Any = layer.wrapper._layer
        at, seen = self.rng.randint(1, 2), 0
        real = experts.start

        def start(*arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                raise InjectedError("start")
            return real(*arguments)

        experts.start = start
        try:
            if error is not None:
                self.raises(error, lambda: layer.wrapper.submit_forward(*call.args))
                return
            self.oracle.submitted(layer, call)
            try:
                layer.wrapper.submit_forward(*call.args)
            except InjectedError:
                layer.promise = None
                self.oracle.failed(layer)
                layer.counted = layer.wrapper.ignored_ids
                self.calls["injected"] += 1
        finally:
            del experts.start
        if layer.promise is not None:
            self.sync(layer)

    def retire(self, layer: Layer) -> None:
        """Close a layer, or drop the last reference to it; whatever is under way in it."""
        closing = self.rng.random() < 0.5
        self.oracle.gone(layer, closing)
        if closing:
            self.close(layer.wrapper, layer.weights)
        layer.wrapper = None  # type: ignore[assignment]
        if self.rng.random() < 0.3:
            gc.collect()
        self.calls["retired"] += 1

    def close(self, wrapper: KTMoEWrapper, weights: Weights) -> None:
        """Close, once or twice, and see that nothing can be done with it any more."""
        for _ in range(self.rng.randint(1, 2)):
            wrapper.close()
        call = Call.random(self.rng, self.sizes)
        for use in (
            lambda: wrapper.forward(*call.args),
            lambda: wrapper.sync_forward(call.hidden),
            lambda: weights.load(wrapper),
        ):
            self.raises((RuntimeError, "is closed"), use)

    def renew(self) -> None:
        """A layer at an index that is free."""
        free = [i for i in range(9) if i not in self.oracle.layers]
        if len(self.oracle.layers) >= 4 or not free:
            return
        deferred = 0 if self.kind == "checkpoint" else self.rng.randint(0, self.sizes.k)
        self.add(self.rng.choice(free), deferred, Weights(self.rng, self.sizes, 2))
        self.oracle.layers = dict(sorted(self.oracle.layers.items()))
        self.calls["constructed"] += 1

    def raises(self, expected: Expected, run: Callable[[], Any]) -> None:
        """Run what must raise `expected`."""
        kind, message = expected
        try:
            run()
        except kind as error:
            assert message in str(error), f"{error!r} does not say {message!r}"
            self.calls["refused"] += 1
            return
        raise AssertionError(f"no {kind.__name__} that says {message!r}")
