"""Programs for `Model` as hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.streams.model import INDICES, Captured, E, Model

SIZES = (1, 2, 3, 5)
"""Tokens; 3 and 5 share buffers with other sizes' capacities, and none is announced."""


@dataclass(frozen=True)
class Program:
    """A model, and what is done with it.

    Attributes:
        actions: ("step", tokens, stream, collector), ("graph", tokens, pieces, replays) or
            ("mask", bits).
    """

    seed: int
    flags: bool
    channels: int | None
    deferred: int
    count: int
    haste: tuple[float, float]
    actions: tuple[tuple[object, ...], ...]

    def model(self) -> Model:
        return Model(
            self.seed,
            flags=self.flags,
            channels=self.channels,
            deferred=self.deferred,
            count=self.count,
            haste=self.haste,
        )

    def run(self) -> Model:
        """All actions, with the streams running on in between, and the check of every result."""
        model, graphs, seed = self.model(), list[Captured](), 0
        for action in self.actions:
            seed = (seed + 3) % 24
            match action:
                case ("step", int(tokens), int(stream), collector):
                    model.step(tokens, seed, stream, collector)  # type: ignore[arg-type]
                case ("graph", int(tokens), bool(pieces), int(replays)):
                    graphs.append(model.capture(tokens, pieces))
                    for turn in range(replays):
                        which = graphs[-1 - turn % len(graphs)]  # they take turns
                        model.replay(which, (seed + turn) % 24)
                        model.gpu.run_some(model.rng.randrange(20))
                case ("mask", int(bits)):
                    model.gpu.run()
                    model.set_mask(tuple(bool(bits >> e & 1) for e in range(E)))
            model.gpu.run_some(model.rng.randrange(20))
        model.verify()
        return model


def _actions(deferred: int) -> st.SearchStrategy[tuple[object, ...]]:
    sizes = st.sampled_from(SIZES)
    # deferred experts go from layer to layer, so all of a step runs in one stream's order
    collector = st.none() if deferred else st.sampled_from([None, 0, 1])
    return st.one_of(
        st.tuples(st.just("step"), sizes, st.sampled_from([0, 1]), collector),
        st.tuples(st.just("graph"), sizes, st.booleans(), st.integers(3, 5)),
        st.tuples(st.just("mask"), st.integers(0, 2**E - 1)),
    )


@st.composite
def programs(draw: st.DrawFn, *, flags: bool, deferred: int) -> Program:
    """Any program for this way of handing over and so many deferred experts."""
    speeds = st.sampled_from([0.02, 1.0, 30.0])
    return Program(
        seed=draw(st.integers(0, 2**32 - 1)),
        flags=flags,
        channels=draw(st.sampled_from([None, 1, 2])),
        deferred=deferred,
        count=draw(st.integers(1, len(INDICES))),
        haste=(draw(speeds), draw(speeds)),
        actions=tuple(draw(st.lists(_actions(deferred), min_size=1, max_size=5))),
    )
