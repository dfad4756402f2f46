"""Small receipts of every benchmark, as the benchmarks write them."""

from __future__ import annotations

from typing import Any


def machine(bench: str, **facts: Any) -> dict[str, Any]:
    """A receipt of one processor and day."""
    versions = {"hybrid-moe": "0.1.0"}
    return {"bench": bench, "date": "2026-01-02", "processor": "P (x), 2 cores",
            "versions": versions, **facts}  # fmt: skip


def layer_point(**changes: Any) -> dict[str, Any]:
    """2 ms for 40 MB: 20 of 25 GB/s; 50 of 100 GMAC/s."""
    point = {"method": "MXFP4", "shape": "A", "tokens": 1, "threads": 2, "isa": "avx2", "ms": 2.0,
             "weight_bandwidth": 20.0, "read_bandwidth": 25.0, "rate": 50.0, "rate_ceiling": 100.0,
             "tokens_per_s": 500.0}  # fmt: skip
    return {**point, **changes}


def peer_point(
    library: str, ms: list[float], faster: float | None, **changes: Any
) -> dict[str, Any]:
    """Rounds of `ms`; a call reads 40 MB, and 25 GB/s could be read."""
    point = {
        "library": library,
        "label": f"{library} 1.0",
        "method": "MXFP4",
        "shape": "A",
        "tokens": 1,
        "threads": 2,
        "rounds_ms": ms,
        "read_bandwidths": [25.0] * len(ms),
        "weight_bytes": 40e6,
        "macs": 100e6,
        "our_ceiling": 100e9,
        "spare_cores": 0,
        "ours_is_faster": faster,
        "ms": sorted(ms)[len(ms) // 2],
        "read_bandwidth": 25.0,
    }
    return {**point, **changes}


def pool_point(**changes: Any) -> dict[str, Any]:
    """A job that is handed over."""
    point = {"job": "tiny", "threads": 2, "state": "hot", "caller": "handed over",
             "median_us": 0.5, "p99_us": 1.0, "signal_us": 0.2, "python_us": None}  # fmt: skip
    return {**point, **changes}


def model_point(**changes: Any) -> dict[str, Any]:
    """A whole model: 4 of 8 tok/s, a prompt at half of the peak."""
    point = {"model": "gpt-oss-20b", "engine": "ours", "label": "ours 1.0", "dense": "bf16",
             "context": 512, "computed": True, "threads": 2, "decode": [4.0, 4.0],
             "prefill_tokens_per_s": 40.0, "prefill_share": 0.5, "ours_prefills_faster": None,
             "decode_tokens_per_s": 4.0, "read_bandwidth": 32.0, "roofline": 8.0,
             "decode_share": 0.5, "ours_decodes_faster": None, "memory": 10**10,
             "planned": 2 * 10**10, "prefill_of_plan": 0.9, "decode_of_plan": 1.1}  # fmt: skip
    if changes.get("engine", "ours") != "ours":
        changes = {"planned": None, "ours_decodes_faster": 1.5, "ours_prefills_faster": 2.0,
                   **changes}  # fmt: skip
    return {**point, **changes}


def every_bench() -> list[dict[str, Any]]:
    """One receipt of each benchmark that the report knows."""
    peers = [peer_point("ours", [2.0, 2.0], 1.0), peer_point("ggml", [3.0, 5.0], 2.0)]
    errors = [{"library": "ours", "label": "ours 1.0", "method": "MXFP4", "normal": 0.0023,
               "outliers": 0.0024}]  # fmt: skip
    load = {"first_touch_GBps": 1.0, "GBps": 2.0, "again_GBps": 3.0, "peak_over_packed": 1.01,
            "packed_bytes": 10**9}  # fmt: skip
    big = {"model": "gpt-oss-20b", "expert_bytes": 10**10, "disk_GBps": 2.5, "load_GBps": 2.25,
           "load_s": 4.4, "packed_over_stored": 1.01, "peak_over_plan": 1.02,
           "decode_tokens_per_s": 8.0, "roofline_tokens_per_s": 10.0,
           "prefill_tokens_per_s": 50.0}  # fmt: skip
    linear = {"layer": "o", "format": "BF16", "tokens": 1, "threads": 2, "ms": 2.0,
              "weight_bandwidth": 20.0, "read_bandwidth": 25.0, "rate": 50.0, "rate_ceiling": 100.0,
              "torch_ms": 3.0, "ours_is_faster": 1.5}  # fmt: skip
    read = {"where": "1 thread", "threads": 1, "in_order": 12.5, "at_random": 11.5}
    peak = {"tier": "avx2", "op": "byte_dot", "threads": 2, "one_thread": 60.0,
            "all_threads": 120.0, "formats": {"MXFP4": 60.0}}  # fmt: skip
    quick = {"name": "decode", "value": 90.0, "unit": "%", "higher_is_better": True}
    step = {"part": "steps", "step": "panels", "cycles": 7.25, "GBps": 14.5, "share": 87.0}
    tile = {"part": "tiers", "tier": "amx", "instructions": 17.0}
    precise = {"method": "Q4_K+int8", "normal": 0.0117, "outliers": 0.02, "floor": 0.0017,
               "weights": None}  # fmt: skip
    return [
        machine("ceilings", threads=2, reads=[read], peaks=[peak], skipped={"amx": "amx-tile"}),
        machine("end_to_end", points=[model_point(), model_point(engine="llama.cpp")]),
        machine("dense", points=[linear], empty={"median_us": 9.0, "threads": 2}),
        machine("moe_layer", points=[layer_point(), layer_point(tokens=64)], skipped={}),
        machine("gpu_check", gpu=None, steps=[], points=[]),
        machine("peers", points=peers, errors=errors),
        machine(
            "accuracy",
            isa="avx2",
            points=[precise],
            sizes={"hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2},
        ),
        machine("formats", points=[{**p, "counted_rate": 40.0} for p in peers], errors=errors),
        machine("formats_avx2", points=[{**p, "counted_rate": 30.0} for p in peers], errors=errors),
        machine("pool", points=[pool_point(), pool_point(caller="caller works", signal_us=None)]),
        machine("load", points=[load], packing=[{"format": "MXFP4", "GBps": 10.0}], threads=2),
        machine("big", points=[big], threads=2),
        machine("steps", points=[step, tile], isa="avx2"),
        machine("quick", points=[quick]),
    ]
