"""Every kernel compiles for every architecture, within its registers and without spills.

Compilers are processes of their own, as in use. What is counted here, tensor-core instructions and
wide loads, is what a kernel's cost model stands on: a load that falls apart into narrow ones, or a
loop that is unrolled once more, is seen here and not on a GPU months later.

A test compiles many kernels, since starting a compiler takes longer than most of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import pytest

from hybrid_moe.gpu_kernels.definition import ARCHITECTURES, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import KernelBinary, binaries, warm_all
from hybrid_moe.gpu_kernels.toolchain.cubin import Resources
from tests.gpu.kernel_list import Expected, grouped_gemms, small_kernels

PATTERNS = {
    "mma": r"\bmma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "wide_loads": r"\bld\.global\S*\.v4\.[bfu]32",
    "copies": r"\bcp\.async\.c[ag]\.shared\S*",
}
GENERATIONS = ("sm_80", "sm_90", "sm_120")
USUAL = ("sm_90",)
"""All kernels are compiled for it in every run, and some for the others."""


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is checked is what the compiler makes now, once for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_MOE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(binaries, "_known", {})
        yield


Rows = Mapping[str, tuple[KernelDefinition, Expected]]


def _problems(rows: Rows, architectures: Iterable[str]) -> list[str]:
    """Of all kernels for all architectures, compiled together."""
    asked = [(name, arch) for arch in architectures for name in rows]
    found = warm_all([(rows[name][0], arch) for name, arch in asked])
    return [
        f"{name} for {arch}: {problem}"
        for (name, arch), binary in zip(asked, found, strict=True)
        for problem in _of_one(binary, rows[name][1])
    ]


def _of_one(binary: KernelBinary, expected: Expected) -> Iterator[str]:
    taken = binary.resources
    if taken.local_bytes:
        yield f"{taken.local_bytes} bytes of local memory: it spills"
    if taken.registers > expected.registers:
        yield f"{taken.registers} registers, at most {expected.registers}"
    found = {what: len(re.findall(pattern, binary.ptx)) for what, pattern in PATTERNS.items()}
    if found["mma"] != expected.mma:
        yield f"{found['mma']} mma, not {expected.mma}"
    if found["wide_loads"] < expected.wide_loads:
        yield f"{found['wide_loads']} wide loads, at least {expected.wide_loads}"
    if found["copies"] < expected.copies or (found["copies"] and not expected.copies):
        yield f"{found['copies']} copies to shared memory, at least {expected.copies}"


def test_small_kernels() -> None:
    """`test_everything` has all architectures."""
    assert _problems(small_kernels(), USUAL) == []


def test_each_generation() -> None:
    """A kernel of each kind."""
    gemms, small = grouped_gemms(), small_kernels()
    chosen = {name: gemms[name] for name in ("gate_up, MXFP4, 8", "down, BF16, 64")}
    chosen |= {name: small[name] for name in ("pack_few, MXFP4", "combine")}
    assert _problems(chosen, set(GENERATIONS) - set(USUAL)) == []


def test_kernels_of_a_chain_that_overlaps() -> None:
    """Programmatic dependent launch adds two instructions and nothing else, from sm_90 on."""
    rows = small_kernels(pdl=True)
    chain = {name: rows[name] for name in ("pack_few, MXFP4", "combine")}
    gemms = grouped_gemms(pdl=True)
    chain["gate_up"] = gemms["gate_up, MXFP4, 8"]
    chain |= {name: gemms[name] for name in ("down, MXFP4, 8", "down, MXFP4, 64")}
    assert _problems(chain, USUAL) == []
    for definition, _ in chain.values():
        text = binaries.compiled(definition, "sm_90").ptx
        assert text.count("griddepcontrol.launch_dep") == 1
        assert not _ends_without_waiting(text), definition.name


def _ends_without_waiting(text: str) -> bool:
    """Whether a thread may end before it has waited for the kernel in front: where no thread of a
    grid waits, the grid may be over first, and who waits for it does not wait for the other."""
    lines = [line.strip() for line in text[text.index("{", text.index(".entry")) :].splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    waiting, seen = [0], set()
    while waiting:
        at = waiting.pop()
        line = lines[at]
        if at in seen or line.startswith("griddepcontrol.wait"):
            continue
        seen.add(at)
        if re.match(r"(@\S+\s+)?(ret|exit);", line):
            return True
        branch = re.match(r"(@\S+\s+)?bra(?:\.uni)?\s+(\S+);", line)
        if branch:
            waiting.append(labels[branch[2]])
        if not (branch and branch[1] is None):
            waiting.append(at + 1)
    return False


def _of_format(fmt: str) -> Rows:
    return {name: row for name, row in grouped_gemms().items() if name.split(", ")[1] == fmt}


@pytest.mark.parametrize("fmt", ["MXFP4", "BF16"])
def test_grouped_gemms(fmt: str) -> None:
    """Both, for every tile."""
    rows = _of_format(fmt)
    assert len(rows) == 8
    assert _problems(rows, USUAL) == []


def test_grouped_gemms_of_other_formats() -> None:
    """One way through K each, of the formats with the most fields and the most registers."""
    chosen = ("down, NVFP4, 8", "down, FP8, 64", "down, Q5_K, 8", "gate_up, Q4_K, 64")
    assert _problems({name: grouped_gemms()[name] for name in chosen}, USUAL) == []


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything(arch: str) -> None:
    assert _problems({**small_kernels(), **grouped_gemms()}, [arch]) == []


def test_problems_are_seen() -> None:
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1};\n"
        "ld.global.nc.L2::128B.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
        "ld.global.v2.b32 {%r1, %r2}, [%rd1];\n"
        "cp.async.cg.shared.global [%r1], [%rd1], 16;\n"
    )
    binary = KernelBinary("sm_90", "k", text, b"", Resources(40, 0, 0, ()))
    assert list(_of_one(binary, Expected(40, mma=1, wide_loads=1, copies=1))) == []
    spilling = dataclasses.replace(binary, resources=Resources(41, 8, 0, ()))
    assert list(_of_one(spilling, Expected(40, mma=2, wide_loads=2))) == [
        "8 bytes of local memory: it spills",
        "41 registers, at most 40",
        "1 mma, not 2",
        "1 wide loads, at least 2",
        "1 copies to shared memory, at least 0",
    ]
