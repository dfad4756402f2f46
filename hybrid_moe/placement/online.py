"""Experts change places while a model runs: `OnlinePlacement`, between one step and the next.

    routed (a counter for each expert, that compiled routing keeps) ─► averages ─► swaps
    swaps ─► demote, promote of each layer ─► the next step goes by the new placement

What has been routed is read where it is counted, so nothing is asked of a GPU and replays of graphs
count. What a swap is worth, and why nothing swaps back and forth, is in `swap_loops`. Moves are the
layers' own and exact at every instant (`runtime.placement_moves`); here is only when and which.

Experts that are due to be sent to a layer for one batch (`runtime.prefill_stream`) are asked about
as well: their copy is paid for, so that one which is used enough comes to stay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.locks import ProcessLock
from hybrid_moe.logs import warn_once
from hybrid_moe.runtime.metrics import metrics
from hybrid_moe.runtime.prefill_stream import PrefillStream, Swap
from hybrid_moe.schedule.staying import staying
from hybrid_moe.text import format_bytes, parse_size

logger = logging.getLogger(__name__)

LINK_BYTES = 1e9
"""Of a second, by default: a tenth of what PCIe 3 x16 copies, a 25th of PCIe 4, so a model that
swaps all the time is slower by so much, and one whose topic stays by nothing."""

BURST_SECONDS = 0.1
"""Of what a link may copy, so much may be due at once: what a step waits for swaps at most, unless
one swap alone is more. As long as between looks, else some of the budget would be lost."""

LOOK_SECONDS = 0.1
"""Between looks at the counters. On a busy Zen 4 a look took 1.8 us for each of 48 layers of 128
experts and 5 us for each of 61 of 256, a step that does not look 0.4 us in all: at 25 steps a
second 2 us for each layer and step."""

HALF_LIFE_PAIRS = 64
"""Pairs of an average expert in which the fast average forgets a half: 256 tokens where 4 of 16
experts are chosen, 2048 of 8 in 256."""

SLOWER = 8
"""Half-lives of the fast average in one of the slow one."""

MARGIN = 0.1
"""An expert replaces another if it is used more by a tenth of its own use at least."""

PAYBACK_PAIRS = 4.0
"""Of a half-life, for each expert that is copied. A pair that the CPU does not compute saves it
reading an expert, which takes its memory a quarter or more of the time that the link needs."""

MOST_SWAPS = 64
"""Of one look."""


class MovableLayer(Protocol):
    """What is needed of a layer: a `KTMoEWrapper` with a `gpu_backend`."""

    @property
    def layer_idx(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def num_experts_per_tok(self) -> int: ...

    @property
    def routed(self) -> npt.NDArray[np.int64]: ...

    @property
    def elsewhere(self) -> torch.Tensor: ...

    @property
    def gpu_experts_mask(self) -> torch.Tensor: ...

    @property
    def gpu_slots(self) -> int: ...

    @property
    def slot_nbytes(self) -> int: ...

    @property
    def keeps_panels(self) -> bool: ...

    @property
    def prefill_stream(self) -> PrefillStream | None: ...

    def promote(self, expert: int, cuda_stream: int | None = None) -> None: ...

    def demote(self, expert: int, cuda_stream: int | None = None) -> None: ...


@dataclass(frozen=True)
class OnlineOptions:
    """How much may move, and how soon.

    Attributes:
        bytes_per_second: of the link between CPU and GPU that swaps may use.
        half_life_pairs: see `HALF_LIFE_PAIRS`.
        margin: see `MARGIN`.
        payback_pairs: see `PAYBACK_PAIRS`.
        keep_panels: experts on the GPU stay in the CPU's memory too: a swap copies half as much,
            and the CPU's memory is taken for all experts.
        read_bandwidth: bytes per second at which the CPU reads cold experts, for the report of the
            time that was gained; None for what this process has reached so far.

    Raises:
        ValueError: a number that is not positive, a margin outside 0..1, a negative payback.
    """

    bytes_per_second: float = LINK_BYTES
    half_life_pairs: float = HALF_LIFE_PAIRS
    margin: float = MARGIN
    payback_pairs: float = PAYBACK_PAIRS
    keep_panels: bool = False
    read_bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "half_life_pairs", "read_bandwidth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}, must be above 0")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin!r}, must be from 0 to below 1")
        if not self.payback_pairs >= 0:
            raise ValueError(f"payback_pairs is {self.payback_pairs!r}, must be 0 or more")

    @classmethod
    def of(cls, given: Any) -> OnlineOptions | None:
        """What `dynamic` or HYBRID_MOE_DYNAMIC says: None where experts stay.

        Args:
            given: False, None, "" or "0" for no; True or "1" for the defaults; "2GB" or "2GB/s" for
                what swaps may copy in a second; "keep" for `keep_panels`; "read=60GB" for
                `read_bandwidth`; several with commas between them; or the options themselves.

        Raises:
            TypeError, ValueError: something else.
        """
        if given is None or given is False or given in ("", "0"):
            return None
        if given is True or given == "1":
            return cls()
        if isinstance(given, cls):
            return given
        if not isinstance(given, str):
            raise TypeError(f"dynamic is {given!r}, must be {_FORMS}")
        found: dict[str, Any] = {}
        for word in map(str.strip, given.split(",")):
            name = "read_bandwidth" if word.startswith(_READ) else "bytes_per_second"
            if word == KEEP:
                found["keep_panels"] = True
            elif word != "1":
                try:
                    found[name] = parse_size(word.removeprefix(_READ).removesuffix("/s"))
                except ValueError as error:
                    raise ValueError(f"dynamic is {given!r}, must be {_FORMS}: {error}") from error
        return cls(**found)

    @property
    def panels(self) -> str:
        """As `KTMoEWrapper` takes it."""
        return KEEP if self.keep_panels else "drop"


KEEP = "keep"
_READ = "read="

_FORMS = (
    'True or False, how many bytes may move in a second ("2GB"), "keep", "read=" and the bytes '
    'that the CPU reads in a second, or several of these ("2GB,keep")'
)


@dataclass(frozen=True)
class OnlineReport:
    """What online placement has done so far.

    Attributes:
        tokens: that have passed the layer that saw most, as far as looked at.
        hot_pairs: (token, expert) pairs that hot experts took, of the experts that can move.
        pairs: of all experts that can move.
        first_pairs: that would have been hot if nothing had moved.
        swaps: experts that came to the GPU. returns: those of them that had left it in the last
            two half-lives before: oscillation, if there is any.
        stays: of `swaps`, experts that were due to be sent for a batch, and came to stay.
        moved_bytes: copied by both directions.
        gained_bytes: of experts that the CPU had not to read, beside the placement of the start.
        read_bandwidth: see `OnlineOptions`; None before the CPU has computed anything.
    """

    tokens: int
    hot_pairs: int
    pairs: int
    first_pairs: int
    swaps: int
    returns: int
    moved_bytes: int
    gained_bytes: int
    read_bandwidth: float | None = None
    stays: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the pairs that hot experts took; 0 before the first."""
        return self.hot_pairs / self.pairs if self.pairs else 0.0

    @property
    def gained_seconds(self) -> float | None:
        """Of reading by the CPU; None where its bandwidth is not known yet."""
        return None if self.read_bandwidth is None else self.gained_bytes / self.read_bandwidth

    def summary(self) -> str:
        """One line."""
        first = self.first_pairs / self.pairs if self.pairs else 0.0
        line = (
            f"hot experts took {100 * self.hit_rate:.1f} % of {self.pairs} pairs "
            f"({100 * first:.1f} % if none had moved); {self.swaps} came to the GPU, "
            f"{self.returns} of them back, {format_bytes(self.moved_bytes)} copied"
        )
        if self.gained_seconds is not None:
            line += f"; {self.gained_seconds:.1f} s of the CPU's reading gained"
        return line


class OnlinePlacement:
    """See the module. Any thread; where two come at once, the later one moves nothing.

    Args:
        layers: of one model, loaded. Those without a GPU half, without a slot or without an expert
            on the CPU have nothing to swap and are left out.
        options: how much may move.
        clock: seconds, monotonic.

    Attributes:
        active: whether there is any layer to swap in.
    """

    def __init__(
        self,
        layers: Sequence[MovableLayer],
        options: OnlineOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from hybrid_moe.placement import swap_loops  # numba: of those alone who swap

        self._loops, self._clock = swap_loops, clock
        self.options = options or OnlineOptions()
        self._layers = [layer for layer in layers if _can_swap(layer)]
        self.active = bool(self._layers)
        L = len(self._layers)
        E = max((layer.num_experts for layer in self._layers), default=0)
        self._state = np.full((L, E), swap_loops.FIXED, np.int8)
        self._read_placement()
        self._first = self._state.copy()
        self._counters = [layer.routed for layer in self._layers]
        self._routed = np.zeros((L, E), np.int64)
        self._read_counters()
        self._seen = self._routed.copy()
        self._top_k = np.array([layer.num_experts_per_tok for layer in self._layers], np.float64)
        experts = np.array([layer.num_experts for layer in self._layers], np.float64)
        fast = self.options.half_life_pairs * experts / self._top_k
        self._half_life = np.stack([fast, SLOWER * fast])
        self._slots = np.array([layer.gpu_slots for layer in self._layers], np.int64)
        self._nbytes = np.array([layer.slot_nbytes for layer in self._layers], np.float64)
        keeps = self.active and all(layer.keeps_panels for layer in self._layers)
        self._copies = 0.0 if keeps else 1.0
        self._use = np.zeros((2, L, E))
        self._tokens = np.zeros(L)
        self._rest_until = np.zeros((L, E))
        self._left_at = np.full((L, E), -np.inf)
        self._pairs = np.zeros((L, 3), np.int64)
        self._swaps_table = np.full((MOST_SWAPS, 3), -1, np.int64)
        self._swaps = self._returns = self._stays = self._moved_bytes = 0
        self._turn = ProcessLock()
        most = float(self._nbytes.max(initial=0.0)) * (1 + self._copies)
        self._burst = max(BURST_SECONDS * self.options.bytes_per_second, most)
        self._allowance, self._filled_at = self._burst, clock()
        self._next_look = self._filled_at
        if self.active:
            swap_loops.prepare()  # else the first step would wait for it
        for layer in self._layers:
            if layer.prefill_stream is not None:
                layer.prefill_stream.let_stay(self.stay)

    def step(self, cuda_stream: int | None = None) -> int:
        """To be called between two steps of the model: look at what was routed, if it is time to,
        and swap what has to be.

        Args:
            cuda_stream: where the layers' calls and graphs run, as for `promote`.

        Returns:
            Experts that were moved, up or down.
        """
        now = self._clock()
        if now < self._next_look or not self.active or not self._turn.acquire(timeout=0):
            return 0
        try:
            self._next_look = now + LOOK_SECONDS
            self._fill(now)
            return self._swap(self._look(), cuda_stream)
        finally:
            self._turn.release()

    def stay(self, layer_idx: int, sent: Sequence[int], swap: Swap) -> tuple[int, ...]:
        """Let some of the experts that are due to be sent to a layer for one batch come to stay:
        those that are used more than the least used ones there, beyond `schedule.staying`'s margin
        and what chance explains. Of the budget they take what the others' way back takes.

        Args:
            sent: cold experts.
            swap: swaps two experts of the layer now.

        Returns:
            Those that have come.
        """
        at = next((n for n, layer in enumerate(self._layers) if layer.layer_idx == layer_idx), -1)
        if at < 0 or not self.active or not self._turn.acquire(timeout=0):
            return ()
        try:
            self._fill(self._clock())
            pairs = self._worth(at, sent)
            return tuple(up for down, up in pairs if self._let_in(at, down, up, swap))
        finally:
            self._turn.release()

    def _worth(self, at: int, sent: Sequence[int]) -> list[tuple[int, int]]:
        """(Expert that goes, expert that stays) of a layer, by the fast average."""
        loops = self._loops
        use, state, now = self._use[loops.FAST, at], self._state[at], float(self._tokens[at])
        life = float(self._half_life[loops.FAST, at])
        rested = self._rest_until[at] <= now
        found = []
        for up, down in staying([e for e in sent if rested[e]], use, (state == loops.HOT) & rested):
            above, below = float(use[up]), float(use[down])
            chance = loops.by_chance(use, state, life, now, above, below)
            payback = self.options.payback_pairs * self._copies / loops.LN2
            if above - below > max(chance, payback):
                found.append((down, up))
        return found

    def _let_in(self, at: int, down: int, up: int, swap: Swap) -> bool:
        """Swap two experts, if the budget has room."""
        loops, cost = self._loops, round(float(self._nbytes[at]) * self._copies)
        if not self.active or cost > self._allowance:
            return False
        try:
            swap(down, up)
        except RuntimeError as error:
            self._give_up(error)
            return False
        self._state[at, down], self._state[at, up] = loops.COLD, loops.HOT
        rest = self._tokens[at] + self._half_life[loops.FAST, at]
        self._rest_until[at, [down, up]] = rest
        self._spend(cost)
        self._moved_bytes += int(self._nbytes[at])
        self._arrived(at, down, up)
        self._stays += 1
        return True

    def report(self) -> OnlineReport:
        """What has been done so far, and gained as of the last look."""
        hot, pairs, first = self._pairs.sum(0).tolist() if self.active else (0, 0, 0)
        gained = (self._pairs[:, 0] - self._pairs[:, 2]) @ self._nbytes if self.active else 0.0
        return OnlineReport(
            tokens=round(float((self._pairs[:, 1] / self._top_k).max(initial=0.0))),
            hot_pairs=hot,
            pairs=pairs,
            first_pairs=first,
            swaps=self._swaps,
            returns=self._returns,
            moved_bytes=self._moved_bytes,
            gained_bytes=round(float(gained)),
            read_bandwidth=self.options.read_bandwidth or metrics().bandwidth,
            stays=self._stays,
        )

    def _look(self) -> int:
        """Take in the counters and plan; returns the swaps in `_swaps_table`."""
        loops = self._loops
        self._read_counters()
        loops.observe(
            self._routed,
            self._seen,
            self._top_k,
            self._half_life,
            self._state,
            self._first,
            self._use,
            self._tokens,
            self._pairs,
        )
        loops.plan_swaps(
            self._use,
            self._half_life,
            self._state,
            self._slots,
            self._rest_until,
            self._tokens,
            self._nbytes,
            self._copies,
            self._allowance,
            self.options.margin,
            self.options.payback_pairs * (1 + self._copies),
            self._swaps_table,
        )
        return int((self._swaps_table[:, 0] >= 0).sum())

    def _swap(self, count: int, cuda_stream: int | None) -> int:
        """Carry the planned swaps out, until one fails."""
        moves = 0
        try:
            for at, down, up in self._swaps_table[:count].tolist():
                layer, nbytes = self._layers[at], int(self._nbytes[at])
                if down >= 0:
                    layer.demote(down, cuda_stream)
                    self._spend(round(nbytes * self._copies))
                    moves += 1
                layer.promote(up, cuda_stream)
                self._spend(nbytes)
                self._arrived(at, down, up)
                moves += 1
        except RuntimeError as error:
            self._give_up(error)
        if moves:
            logger.debug("%s", self.report().summary())
        return moves

    def _arrived(self, at: int, down: int, up: int) -> None:
        """Count a swap; `down` is -1 where a slot was free."""
        if down >= 0:
            self._left_at[at, down] = self._tokens[at]
        self._swaps += 1
        since = self._tokens[at] - self._left_at[at, up]
        self._returns += bool(since < 2 * self._half_life[0, at])

    def _give_up(self, error: RuntimeError) -> None:
        """Nothing moves any more; a layer says at its next call whether it is whole."""
        self.active = False
        warn_once(f"experts stay where they are from now on, since a move failed: {error}")

    def _fill(self, now: float) -> None:
        """The budget grows with time."""
        grown = self._allowance + (now - self._filled_at) * self.options.bytes_per_second
        self._allowance, self._filled_at = min(self._burst, grown), now

    def _spend(self, nbytes: int) -> None:
        self._allowance -= nbytes
        self._moved_bytes += nbytes

    def _read_counters(self) -> None:
        for row, counter in zip(self._routed, self._counters, strict=True):
            row[: len(counter)] = counter

    def _read_placement(self) -> None:
        loops = self._loops
        for row, layer in zip(self._state, self._layers, strict=True):
            hot = np.where(layer.gpu_experts_mask.numpy(), loops.HOT, loops.COLD)
            row[: len(hot)] = np.where(layer.elsewhere.numpy(), loops.FIXED, hot)


def prepare_loops() -> None:
    """Compile what `OnlinePlacement` needs, which takes seconds; once in a process."""
    from hybrid_moe.placement import swap_loops

    swap_loops.prepare()


def _can_swap(layer: MovableLayer) -> bool:
    cold = ~(layer.gpu_experts_mask | layer.elsewhere)
    return layer.gpu_slots > 0 and bool(cold.any())
