"""A routing profile as a picture: heatmap, entropy, hit rates and drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.placement.routing_statistics import drift, entropy_bits, halves, hit_rate_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 11.0, 6.4, 110


def draw(profile: RoutingProfile, path: Path) -> None:
    """Draw a profile into a file, whose suffix says the format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    grid: Any = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    _heatmap(figure, figure.add_subplot(grid[0, :]), profile)
    _entropy(figure.add_subplot(grid[1, 0]), profile)
    _hit_rates(figure.add_subplot(grid[1, 1]), profile)
    _drift(figure.add_subplot(grid[1, 2]), profile)
    figure.savefig(path)


def _heatmap(figure: Any, axes: Axes, profile: RoutingProfile) -> None:
    even = profile.shares() * profile.model.num_experts
    image = axes.imshow(even, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("times an even share")
    _layer_ticks(axes, profile)
    axes.set_xlabel("expert")
    tokens = int(profile.tokens.sum())
    name = profile.model.model_type or "a model"
    axes.set_title(f"use of experts: {name}, {tokens} tokens of {profile.source or 'unknown text'}")


def _layer_ticks(axes: Axes, profile: RoutingProfile) -> None:
    L = profile.shape[0]
    at = np.unique(np.linspace(0, L - 1, min(L, 12)).round().astype(int))
    axes.set_yticks(at, [str(profile.model.layers[row]) for row in at])
    axes.set_ylabel("layer")


def _entropy(axes: Axes, profile: RoutingProfile) -> None:
    most = np.log2(profile.shape[1])
    axes.plot(profile.model.layers, entropy_bits(profile.counts), marker=".")
    axes.axhline(most, color="grey", linestyle=":", label="perfect balance")
    axes.set_xlabel("layer")
    axes.set_ylabel("entropy, bits")
    axes.legend(loc="best", fontsize="small")
    axes.set_title("balance")


def _hit_rates(axes: Axes, profile: RoutingProfile) -> None:
    every = profile.shape[0] * profile.shape[1]
    hot = 100 * np.arange(every + 1) / every
    parts = halves(profile)
    if parts is not None:
        unseen = 100 * hit_rate_curve(*parts)
        axes.plot(hot, unseen, label="chosen by the first half,\nmeasured on the second")
    known = 100 * hit_rate_curve(profile.counts, profile.counts)
    axes.plot(hot, known, linestyle="--", label="chosen by all, measured on all")
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label="chosen blindly")
    axes.set_xlabel("hot experts, %")
    axes.set_ylabel("hit rate, %")
    axes.legend(loc="lower right", fontsize="small")
    axes.set_title("hit rate")


def _drift(axes: Axes, profile: RoutingProfile) -> None:
    found = drift(profile)
    axes.set_title("drift")
    if not len(found.distance):
        axes.text(0.5, 0.5, "no windows", ha="center", va="center")
        axes.set_axis_off()
        return
    tokens = np.cumsum(profile.window_tokens)[:-1]
    axes.plot(tokens, 100 * found.distance, marker=".", label="measured")
    axes.plot(tokens, 100 * found.by_chance, color="grey", linestyle=":", label="by chance alone")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("choices that move, %")
    axes.legend(loc="best", fontsize="small")
