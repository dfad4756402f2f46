"""Programs that drop layers, and what belongs to them, while their jobs are on the way."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.drivers.records import Mailbox
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.streams.buffers import BufferPool
from hybrid_moe.streams.faults import check_errors
from tests.streams.model import Captured, Check, Inputs, Model, layers, make_layers
from tests.streams.watched_memory import Ledger, watched

HOWS = ("drop", "close", "close in a capture", "sync", "failed sync", "close layer")
"""Ways in which a submission's owner goes: nobody syncs, `close` without a sync, and where no wait
can be queued, after a sync, after a sync that raised, and the packed weights are closed first."""


@dataclass(frozen=True)
class Drop:
    """A submission to each layer, and their end.

    Attributes:
        how: of `HOWS`.
        steps: that streams, watcher and workers take between the submission and the end.
        replays: 0 for an eager submission; else replays of a captured one, all queued before.
    """

    seed: int
    flags: bool
    how: str
    steps: int
    deferred: int = 0
    count: int = 1
    replays: int = 0
    haste: tuple[float, float] = (1.0, 1.0)
    channels: int | None = None

    def run(self) -> bool:
        """All of it, with a look at all memory at every step. Whether there was something left to
        do when the layers went.

        Raises:
            UseAfterFreeError: something could still be used. AssertionError: a result is wrong, or
                memory stays.
        """
        layers()  # those that expected results come from are not watched
        keeping.release(most=None)
        gc.freeze()  # collections look at what this run makes only
        try:
            with watched() as ledger:
                return _Run(self, ledger).run()
        finally:
            gc.unfreeze()


class _Run:
    def __init__(self, drop: Drop, ledger: Ledger) -> None:
        self.drop = drop
        self.model = model = Model(
            drop.seed,
            flags=drop.flags,
            deferred=drop.deferred,
            count=drop.count,
            haste=drop.haste,
            channels=drop.channels,
            own=make_layers(),
        )
        ledger.roots.append(model.addresses)
        self.check = ledger.check
        model.gpu.before_step = ledger.check
        self.before = keeping.count()
        self.watched = [weakref.ref(runner._layer) for runner in model.runners]

    def run(self) -> bool:
        model, drop = self.model, self.drop
        captured = self.start()
        under_way = True
        for _ in range(drop.steps):
            under_way = model.gpu.step()
        self.end(captured is not None)
        gc.collect()
        self.check()
        model.gpu.run()
        self.check()
        if captured is not None:
            self.after_replays(captured)
        else:
            for result in model.checks:
                torch.testing.assert_close(result.got, result.expected(), rtol=0, atol=0)
            check_errors()
        self.nothing_stays(captured)
        return under_way

    def start(self) -> Captured | None:
        """Submissions on their way: nothing is synced yet, or replays of captured ones."""
        model, drop = self.model, self.drop
        if drop.replays:
            captured = model.capture(2)
            for turn in range(drop.replays):
                model.replay(captured, seed=turn)
            return captured
        for at, runner in enumerate(model.runners):
            values = Inputs.random(2, at)
            given = values.empty()
            model.fill(model.streams[0], given, values)
            runner.submit(*given.tensors, 1)
            model.clobber(model.streams[0], given)
        return None

    def end(self, captured: bool) -> None:
        """The layers go, and all that this test has of them."""
        model, how = self.model, self.drop.how
        for at, runner in enumerate(model.runners if not captured else []):
            like = Inputs.random(2, 0).hidden
            if how == "sync":
                got = runner.sync(like, 1)
                model.checks.append(Check(f"layer {at}", got, model.expect(at, 2, 0)))
            elif how == "failed sync":
                self.fail_to_sync(runner, like)
        for runner in model.runners:
            if how == "close":
                runner.close()
            elif how == "close in a capture":
                with model.gpu.capture(model.streams[0]) as graph:
                    runner.close()
                assert not graph.nodes
            elif how == "close layer":
                runner._layer.close()
        del runner
        model.runners.clear()
        model.mask = torch.zeros(1)
        if not self.drop.replays:
            model.pool = BufferPool()

    def fail_to_sync(self, runner: Any, like: torch.Tensor) -> None:
        """The sync comes in a capture, and the submission did not."""
        other = self.model.gpu.stream(7)
        with self.model.gpu.capture(other):
            self.model.on(other)
            with pytest.raises(RuntimeError, match="must either both be captured"):
                runner.sync(like, 1)
        self.model.on(self.model.streams[0])

    def after_replays(self, captured: Captured) -> None:
        """Replays gave results or NaN; one more, without the layer, gives NaN and an error."""
        model = self.model
        lost = 0
        for result in model.checks:
            if result.got.isnan().all():
                lost += 1
            else:
                torch.testing.assert_close(result.got, result.expected(), rtol=0, atol=0)
        assert lost == 0 or self.drop.steps < 1000
        try:
            check_errors()
            assert lost == 0
        except RuntimeError as error:
            assert lost > 0 and "closed or dropped" in str(error)
        model.checks.clear()
        model.replay(captured, seed=5)
        model.gpu.run()
        assert all(result.got.isnan().all() for result in model.checks)
        with pytest.raises(RuntimeError, match="replayed after a layer that it runs had been clos"):
            check_errors()
        check_errors()

    def nothing_stays(self, captured: Captured | None) -> None:
        """All is let go but what replays may touch, and mailboxes."""
        gc.collect()
        assert all(layer() is None for layer in self.watched), "a layer stays"
        busy, replayed = keeping.count()
        assert busy == self.before[0]
        assert captured is not None or replayed == self.before[1]
        pinned = [tensor for ref in self.model.gpu.allocated if (tensor := ref()) is not None]
        if captured is None:
            assert all(t.shape[-1] == Mailbox.nbytes // 8 for t in pinned), "pinned memory stays"
