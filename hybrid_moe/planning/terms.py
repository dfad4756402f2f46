"""What a predicted time consists of: amounts over speeds, each in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6))

_WITHOUT_GPU = "a GPU, which takes everything but the routed experts"

HELP = {
    "RAM bandwidth": "more experts on the GPU, faster memory or more memory channels",
    "CPU arithmetic": "more cores, or a processor with AVX-512 or AMX; more experts on the GPU",
    "GPU bandwidth": "a GPU with faster memory, or more GPUs",
    "GPU arithmetic": "a faster GPU, or more GPUs",
    "link": "a faster slot for the GPU, or more experts that stay on it",
    "hand-over": "all experts of a layer on the GPU: this is the price of each layer on the CPU",
    "experts": "faster memory or more memory channels; a GPU with some of the experts",
    "experts, arithmetic": "more cores, or a processor with AVX-512 or AMX",
    "linear layers": f"fewer bits (--dense int8, --dense mxfp4), faster memory, or {_WITHOUT_GPU}",
    "linear layers, arithmetic": f"more cores, or {_WITHOUT_GPU}",
    "KV cache": "a shorter context, or faster memory",
    "attention": f"shorter prompts, more cores, or {_WITHOUT_GPU}",
    "the rest": _WITHOUT_GPU,
    "between tokens": "several requests at once: this is what a token takes beside its layers",
    "between jobs": "fewer, larger layers: this is what each takes beside what it reads",
}
"""What would make a prediction's longest term shorter, by its name."""


@dataclass(frozen=True)
class Term:
    """A part of the time: what it is, seconds, and the amount over the speed in words."""

    name: str
    seconds: float
    why: str


@dataclass(frozen=True)
class Prediction:
    """A predicted speed.

    Attributes:
        tokens_per_second: of one request.
        terms: where the time goes; terms that overlap are all listed.
        limit: the longest term in words.
        help: what would make it faster.
    """

    tokens_per_second: float
    terms: tuple[Term, ...]
    limit: str
    help: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def reading(name: str, what: str, nbytes: float, speed: float) -> Term:
    """The time in which `nbytes` are read."""
    return Term(name, nbytes / speed, f"{_si(nbytes, 'B')} of {what} at {_si(speed, 'B/s')}")


def computing(name: str, what: str, count: float, speed: float, unit: str = "MAC") -> Term:
    """The time of `count` operations."""
    why = f"{_si(count, unit)} of {what} at {_si(speed, f'{unit}/s')}"
    return Term(name, count / speed, why)


def each(name: str, count: int, what: str, seconds: float) -> Term:
    """So many times a fixed time."""
    return Term(name, count * seconds, f"{count} {what} x {seconds * 1e6:g} us")


def prediction(terms: Sequence[Term], seconds: float, tokens: int) -> Prediction:
    """`tokens` in `seconds`, of which `terms` say where they go."""
    longest = max(terms, key=lambda term: term.seconds)
    limit = f"{longest.name}: {longest.why}"
    kept = tuple(term for term in terms if term.seconds > 0)
    return Prediction(tokens / seconds, kept, limit, HELP[longest.name])


def _si(value: float, unit: str) -> str:
    """1.9e9, "B" -> "1.9 GB"; from 100 on without a fraction."""
    prefix, size = next((row for row in _PREFIXES if value >= row[1]), _PREFIXES[-1])
    return f"{value / size:.{0 if value >= 100 * size else 1}f} {prefix}{unit}"
