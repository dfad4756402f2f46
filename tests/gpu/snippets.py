"""PTX written by hand, run in the simulator: a few instructions between loads and stores."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.gpu.simulator import GlobalMemory, Lint, launch

Array = np.ndarray[Any, Any]

SIZES = {"b8": 8, "b16": 16, "b32": 32, "b64": 64}
REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<20>;
"""


def entry(body: str, pointers: int, threads: int = 32, shared: str = "") -> str:
    """A kernel with pointers in %rd0, ...; its thread is in %r0."""
    params = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(pointers))
    return (
        f".version 8.8\n.target sm_80\n{shared}\n.visible .entry kernel({params})\n"
        f".reqntid {threads}, 1, 1\n{{{REGISTERS}{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}"
    )


def run(
    body: str,
    *arrays: Array,
    threads: int = 32,
    grid: int = 1,
    shared_bytes: int = 0,
    fixed_bytes: int = 0,
    seed: int | None = None,
) -> Lint:
    """Runs `body` over arrays, which it changes."""
    memory, lint = GlobalMemory(), Lint()
    addresses = [memory.add(f"p{i}", array) for i, array in enumerate(arrays)]
    params = np.array(addresses, np.uint64).tobytes()
    shared = ".extern .shared .align 16 .b8 smem[];\n" if shared_bytes else ""
    shared += f".shared .align 4 .b8 fixed[{fixed_bytes}];" if fixed_bytes else ""
    ptx = entry(body, len(arrays), threads, shared)
    launch(ptx, (grid, 1, 1), params, memory, shared_bytes, seed, lint)
    return lint


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    return {"bf16x2": 32, "f16x2": 32, "bf16": 16}.get(kind) or int(kind.lstrip("busf"))


def _register(kind: str, number: int) -> str:
    if kind == "pred":
        return f"%p{number}"
    prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[_bits(kind)]
    return f"{prefix}{10 + number}"


def compute(instruction: str, result: str, *operands: tuple[str, Array]) -> Array:
    """One instruction on every lane.

    Args:
        instruction: "add.s32 {d}, {0}, {1};".
        result: type of the destination.
        operands: type and values of each source, one a lane; bits of bf16 as unsigned integers.

    Returns:
        What the destination holds, in the dtype of its bits.
    """
    lanes = -(-len(operands[0][1]) // 32) * 32
    arrays, body, names = [], "", []
    body += "cvt.u64.u32 %rd9, %r0;\n"
    for i, (kind, values) in enumerate(operands):
        size = _bits(kind) // 8
        padded = np.resize(values, lanes)
        arrays.append(np.ascontiguousarray(padded))
        body += f"mad.lo.u64 %rd8, %rd9, {size}, %rd{i};\n"
        name = _register(kind, i)
        if kind == "pred":
            body += f"ld.global.u8 %rs9, [%rd8];\nsetp.ne.u16 {name}, %rs9, 0;\n"
        else:
            body += f"ld.global.b{8 * size} {name}, [%rd8];\n"
        names.append(name)
    dest, size = _register(result, 9), _bits(result) // 8
    body += instruction.format(*names, d=dest) + "\n"
    out = np.zeros(lanes, f"u{size}")
    body += f"mad.lo.u64 %rd8, %rd9, {size}, %rd{len(arrays)};\n"
    if result == "pred":
        body += f"selp.u16 %rs9, 1, 0, {dest};\n"
        dest = "%rs9"
    body += f"st.global.b{8 * size} [%rd8], {dest};"
    run(body, *arrays, out, threads=lanes)
    return out[: len(operands[0][1])]
