"""Routing profiles of models that nobody has run."""

from __future__ import annotations

import numpy as np

from hybrid_moe.placement.routing_profile import RoutedModel, RoutingProfile


def skewed_profile(
    layers: tuple[int, ...], experts: int, top_k: int, hidden: int = 0, seed: int = 0
) -> RoutingProfile:
    """Some experts are used much more than others, in each layer other ones; layers differ in how
    skewed they are. A thousand tokens of prompts and a thousand of decode."""
    random = np.random.default_rng(seed)
    tokens = 1000
    counts = np.zeros((3, len(layers), experts), np.int64)
    for row in range(len(layers)):
        share = random.dirichlet(np.full(experts, random.uniform(0.3, 3)))
        for phase in (0, 1):
            for _ in range(tokens):  # without replacement: a token takes an expert once
                keys = np.log(share + 1e-9) + random.gumbel(size=experts)
                counts[phase, row, np.argpartition(-keys, top_k)[:top_k]] += 1
    model = RoutedModel("", hidden, experts, top_k, layers)
    return RoutingProfile(model, counts, np.array([tokens, tokens, 0]), source="made up")
