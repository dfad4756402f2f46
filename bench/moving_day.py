"""A day of traffic on real layers whose experts move: memory must not drift, and every pair be
computed exactly once.

    python bench/moving_day.py [--hours 24]

`traffic_day` has the same requests for a whole server, as numbers. Here layers compute them: tiny
ones, their hot experts in the torch back end, with a twentieth of the tokens, in steps of twenty
seconds. Online placement is the one that serves, and swaps as many experts a second as it would of
those of 13 MB. Experts are their own signature: expert e turns column 0 into the rows r with
r % E == e, so that every output says exactly which experts made it, each with its weight.

Shown are, hour by hour, resident memory and the blocks that the interpreter has allocated. One
object that is not freed for each swap would be a block more for each of them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from traffic_day import HOUR, Server, popularity, traffic

from hybrid_moe.placement.online import LINK_BYTES, OnlineOptions, OnlinePlacement, OnlineReport
from hybrid_moe.wrapper import KTMoEWrapper

SERVER = Server(layers=4, experts=32, top_k=4, hot=8)
"""`nbytes` and tokens as there; what computes is tiny."""

H = I = SERVER.experts
STEP = 20
"""Seconds of the day in a step; of its tokens one in as many is computed."""

TOPICS = 6


@dataclass(frozen=True)
class Hour:
    """The end of an hour.

    Attributes:
        tokens: so far. resident: bytes. blocks: of the interpreter, all garbage collected.
        report: of online placement.
    """

    tokens: int
    resident: int
    blocks: int
    report: OnlineReport


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def signature_layer(index: int) -> KTMoEWrapper:
    """A layer whose experts are their signature. For x with 1 in column 0 expert e's gate and up
    give h = 2 in column e (the sigmoid of 32 is 1), which its down projection halves: all exact."""
    E = SERVER.experts
    gate, up, down = torch.zeros(E, I, H), torch.zeros(E, I, H), torch.zeros(E, H, I)
    for e in range(E):
        gate[e, e, 0], up[e, e, 0], down[e, e, e] = 32, 1 / 16, 1 / 2
    hot = torch.zeros(E, dtype=torch.bool)
    hot[: SERVER.hot] = True
    layer = KTMoEWrapper(
        index, E, SERVER.top_k, H, I, gpu_experts_mask=hot, cpuinfer_threads=1,
        gpu_backend="torch", gpu_device="cpu", gpu_slots=SERVER.hot, method="BF16",
    )  # fmt: skip
    layer.load_weights_from_tensors(gate, up, down)
    return layer


def batches(hours: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Ids [L, T, k] of each step, those of a token distinct: its topic's experts, by their shares
    (the k largest of log share + Gumbel noise)."""
    logs = np.log(popularity(SERVER, TOPICS, seed))
    tokens = traffic(SERVER, TOPICS, hours * HOUR, seed).reshape(-1, STEP, TOPICS).sum(1)
    rng = np.random.default_rng(seed)
    for of_topics in rng.poisson(tokens / STEP):
        topic = np.repeat(np.arange(TOPICS), of_topics)
        scores = logs[topic] + rng.gumbel(size=(len(topic), SERVER.layers, SERVER.experts))
        ids = np.argpartition(-scores, SERVER.top_k, axis=2)[..., : SERVER.top_k]
        yield np.ascontiguousarray(ids.transpose(1, 0, 2))


def day(hours: int = 24, seed: int = 0) -> Iterator[Hour]:
    """The hours, as they pass.

    Raises:
        RuntimeError: a pair was lost, computed twice, or with the weights of another expert.
    """
    layers = [signature_layer(index) for index in range(SERVER.layers)]
    seconds = 0.0
    budget = LINK_BYTES * layers[0].slot_nbytes / SERVER.nbytes
    options = OnlineOptions(bytes_per_second=budget)
    online = OnlinePlacement(layers, options, clock=lambda: seconds)
    weights = 2.0 ** torch.arange(SERVER.top_k)
    done = 0
    for step, ids in enumerate(batches(hours, seed), 1):
        T = ids.shape[1]
        hidden = torch.zeros(T, H, dtype=torch.bfloat16)
        hidden[:, 0] = 1
        routed = weights.repeat(T, 1)
        for layer, chosen in zip(layers, torch.from_numpy(ids), strict=True):
            expected = torch.zeros(T, H).scatter_(1, chosen, routed).to(torch.bfloat16)
            if not torch.equal(layer.forward(hidden, chosen, routed), expected):
                raise RuntimeError(f"layer {layer.layer_idx}: not every pair once, in step {step}")
        done += T
        seconds = step * STEP
        online.step()
        if seconds % HOUR == 0:
            gc.collect()
            yield Hour(done, resident_bytes(), sys.getallocatedblocks(), online.report())
    for layer in layers:
        layer.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("hour   tokens  hit rate  swaps  back  resident, MiB   blocks")
    for hour, found in enumerate(
        tqdm(day(given.hours, given.seed), total=given.hours, leave=False)
    ):
        report = found.report
        print(
            f"{hour:4d} {found.tokens:8d}     {report.hit_rate:.3f}  {report.swaps:5d} "
            f"{report.returns:5d}         {found.resident / 2**20:6.1f}  {found.blocks:7d}"
        )


if __name__ == "__main__":
    main()
