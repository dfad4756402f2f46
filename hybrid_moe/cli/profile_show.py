"""`hybrid-moe profile show`: a routing profile in the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_moe.cli.tables import facts, grid
from hybrid_moe.cli.terminal import console

if TYPE_CHECKING:
    import numpy.typing as npt
    from rich.text import Text

    from hybrid_moe.placement.routing_profile import RoutingProfile

HOT_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Shares of all experts on the GPU for which the hit rate is told."""

SHADES = " ░▒▓█"
STEPS = (0.5, 0.8, 1.25, 2.0)
"""Times an even share from which on an expert has the next shade."""

COLOURS = ("grey50", "blue", "green", "yellow", "red")
"""Of the shades, on terminals that have colours."""


def show(
    file: Annotated[Path, typer.Argument(help="A routing profile.", metavar="PROFILE.json")],
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Draw it there; needs "hybrid-moe[plot]".'),
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of experts that are listed.")] = 5,
) -> None:
    """Show a routing profile: heatmap, balance, hit rates, drift, experts that go together."""
    from hybrid_moe.placement.routing_profile_file import read_routing_profile

    profile = read_routing_profile(file)
    if png is not None:
        from hybrid_moe.cli.profile_picture import draw

        draw(profile, png)
        typer.echo(f"{png} is drawn")
        return
    _facts(file, profile)
    _heatmap(profile)
    _layers(profile)
    _hit_rates(profile)
    _pairs(profile, pairs)


def _facts(file: Path, profile: RoutingProfile) -> None:
    from hybrid_moe.placement.routing_profile import PHASES
    from hybrid_moe.placement.routing_statistics import drift

    model = profile.model
    L, E = profile.shape
    tokens = zip(PHASES, profile.tokens.tolist(), strict=True)
    windows = profile.window_tokens
    kept = profile.pairs_kept.min(initial=1.0)
    rows = {
        "model": f"{model.model_type or 'unknown'}, {L} layers of {E} experts, {model.top_k} per "
        "token",
        "source": profile.source or "unknown",
        "tokens": ", ".join(f"{count} of {phase}" for phase, count in tokens if count) or "none",
        "pairs of experts": "unknown"
        if profile.pairs is None
        else "all"
        if kept > 0.9995
        else f"the most frequent ones, {100 * kept:.1f} % or more of each layer's",
        "drift": f"{drift(profile).summary()}"
        + (f"; {len(windows)} windows of {int(windows.mean())} tokens" if len(windows) else ""),
    }
    facts(str(file), rows)


def _heatmap(profile: RoutingProfile) -> None:
    """A line for each layer, a character for each expert, or for a few where there is no room."""
    from rich.text import Text

    screen = console()
    E = profile.model.num_experts
    label = max(len(str(layer)) for layer in profile.model.layers) + len("layer  ")
    columns = max(1, min(E, screen.width - label - 1))
    even = profile.shares() * E
    screen.print(Text(f"use of experts 0..{E - 1}, beside an even share", "bold"))
    for at, layer in enumerate(profile.model.layers):
        row = Text(f"layer {layer}".ljust(label))
        row.append_text(_shaded(even[at], columns))
        screen.print(row, no_wrap=True, overflow="crop")
    legend = Text("".ljust(label))
    for shade, colour, least in zip(SHADES, COLOURS, (0.0, *STEPS), strict=True):
        legend.append(shade, colour).append(f" from {least:g} x  ")
    screen.print(legend)
    if columns < E:
        screen.print(
            Text(f"{'':{label}}a character is the mean of up to {-(-E // columns)} experts")
        )


def _shaded(even: npt.NDArray[Any], columns: int) -> Text:
    import numpy as np
    from rich.text import Text

    bounds = np.arange(columns) * len(even) // columns
    means = np.add.reduceat(even, bounds) / np.diff([*bounds, len(even)])
    text = Text()
    for step in np.searchsorted(STEPS, means, side="right"):
        text.append(SHADES[step], COLOURS[step])
    return text


def _layers(profile: RoutingProfile) -> None:
    import numpy as np

    from hybrid_moe.placement.routing_statistics import entropy_bits

    shares, bits = 100 * profile.shares(), entropy_bits(profile.counts)
    most = np.log2(profile.shape[1])
    rows = [
        (
            str(layer),
            f"{bits[at]:.3f}",
            f"{100 * bits[at] / most:.1f}" if most else "100.0",
            f"{shares[at].min():.2f}",
            f"{shares[at].max():.2f}",
            str(int((profile.counts[at] == 0).sum())),
        )
        for at, layer in enumerate(profile.model.layers)
    ]
    columns = ("layer", "entropy, bits", "% of log2 E", "least used, %", "most used, %", "unused")
    grid("balance", columns, rows)


def _hit_rates(profile: RoutingProfile) -> None:
    from hybrid_moe.placement.routing_statistics import halves, hit_rate_curve

    every = profile.shape[0] * profile.shape[1]
    known = hit_rate_curve(profile.counts, profile.counts)
    parts = halves(profile)
    unseen = None if parts is None else hit_rate_curve(*parts)
    rows = []
    for share in HOT_SHARES:
        hot = round(share * every)
        rows.append(
            (
                f"{100 * share:.0f}",
                str(hot),
                f"{100 * hot / every:.1f}",
                "unknown" if unseen is None else f"{100 * unseen[hot]:.1f}",
                f"{100 * known[hot]:.1f}",
            )
        )
    grid(
        "hit rate, % of pairs, when the most used experts are hot",
        (
            "hot, %",
            "experts",
            "chosen blindly",
            "by the first half, on the second",
            "by all, on all",
        ),
        rows,
    )


def _pairs(profile: RoutingProfile, most: int) -> None:
    from hybrid_moe.placement.routing_statistics import strongest_pairs

    found = strongest_pairs(profile, most)
    if found:
        rows = [
            (str(p.layer), f"{p.first}, {p.second}", str(p.tokens), f"{p.lift:.2f} x")
            for p in found
        ]
        columns = ("layer", "experts", "tokens that use both", "beside chance")
        grid("experts that go together", columns, rows)
