"""Choosing a tier, adding one, and what the compiler makes of each."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import hybrid_moe.cpu_kernels
from hybrid_moe.cpu_kernels.dsl import tiers
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.ops import OPS
from hybrid_moe.cpu_kernels.dsl.tiers import (
    AMX,
    AVX2,
    AVX2_VNNI,
    AVX512,
    AVX512_BF16,
    AVX512_VBMI,
    AVX512_VNNI,
    NEON,
    NEON_DOTPROD,
    PORTABLE,
    TIERS,
    Tier,
    available_tiers,
    choose_tier,
)
from hybrid_moe.cpu_kernels.jit.compile import assembly
from hybrid_moe.cpu_kernels.kernels.library import functions_of
from tests.cpu_kernels.emulation import QUICK

_AVX2 = AVX2.all_features
_AVX512 = AVX512.all_features
_VNNI = AVX512_VNNI.all_features
_BF16 = AVX512_BF16.all_features
_VBMI = AVX512_VBMI.all_features


def _host(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    monkeypatch.setattr(tiers, "host_features", lambda: features)
    monkeypatch.delenv("HYBRID_MOE_ISA", raising=False)


@pytest.mark.parametrize(
    ("features", "tier"),
    [
        (frozenset(), PORTABLE),
        (frozenset({"sse4.2", "avx"}), PORTABLE),
        (frozenset({"avx2"}), PORTABLE),  # without fma
        (_AVX2, AVX2),
        (_AVX2 | {"avx512f"}, AVX2),
        (_AVX2 | {"avxvnni"}, AVX2_VNNI),
        (_AVX2 | {"avxvnni", "avx512f"}, AVX2_VNNI),
        (_AVX512 | {"avxvnni"}, AVX512),
        (frozenset({"avxvnni"}), PORTABLE),
        (_AVX512, AVX512),
        (_AVX512 - {"avx512bw"}, AVX2),
        (_VNNI, AVX512_VNNI),
        (_BF16, AVX512_BF16),
        (_BF16 - {"avx512vnni"}, AVX512),
        (_VBMI, AVX512_VBMI),
        (_VBMI | {"amx-tile", "amx-int8"}, AVX512_VBMI),
        (AMX.all_features, AMX),
        (AMX.all_features - {"avx512vbmi"}, AVX512_BF16),
        (_VBMI - {"avx512bf16"}, AVX512_VNNI),
        (_BF16 - {"fma"}, PORTABLE),
        (_BF16 | {"amx-int8", "avx10.1"}, AVX512_BF16),
        (frozenset({"neon"}), NEON),
        (frozenset({"neon", "dotprod"}), NEON_DOTPROD),
        (frozenset({"dotprod"}), PORTABLE),
    ],
    ids=lambda value: value.name if isinstance(value, Tier) else None,
)
def test_the_most_capable_tier_is_chosen(
    features: frozenset[str], tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    _host(monkeypatch, features)
    assert choose_tier() is tier
    assert [r.tier for r in available_tiers()] == list(TIERS.values())
    for report in available_tiers():
        assert report.usable == (report.tier.all_features <= features)
        assert set(report.missing) == report.tier.all_features - features


def test_the_tests_run_on_the_tier_that_was_asked_for(pytestconfig: pytest.Config) -> None:
    """With --isa; without it on the most capable."""
    asked, chosen = pytestconfig.getoption("isa"), choose_tier()
    usable = [report.tier.name for report in available_tiers() if report.usable]
    assert chosen.name == usable[-1]
    if asked:
        assert chosen in (TIERS[asked], QUICK[asked])


def test_the_environment_forces_a_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    _host(monkeypatch, _BF16)
    for spelling in ("avx2", "AVX2"):
        monkeypatch.setenv("HYBRID_MOE_ISA", spelling)
        assert choose_tier() is AVX2
        assert choose_tier("portable") is PORTABLE, "an argument is nearer than the environment"
    monkeypatch.setenv("HYBRID_MOE_ISA", "")
    assert choose_tier() is AVX512_BF16


@pytest.mark.parametrize("source", ["isa=", "HYBRID_MOE_ISA="])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("avx512_bf16", ["lacks", "avx512bf16", "avx512f", "usable here: portable, avx2"]),
        ("sse9", ["no such tier", "portable", "avx512_vnni"]),
    ],
)
def test_a_tier_that_cannot_be(
    name: str, words: list[str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _host(monkeypatch, _AVX2)
    if source != "isa=":
        monkeypatch.setenv("HYBRID_MOE_ISA", name)
    with pytest.raises(ValueError, match=re.escape(f"{source}{name}")) as caught:
        choose_tier(name if source == "isa=" else None)
    for word in words:
        assert word in str(caught.value)


def test_tiers_inherit() -> None:
    assert AVX512_BF16.lowering("lookup16") == AVX512.lowering("lookup16")
    assert AVX512_BF16.lowering("byte_dot") == AVX512_VNNI.lowering("byte_dot")
    assert AVX512.lowering("byte_dot") != AVX2.lowering("byte_dot")
    assert AVX2_VNNI.lowering("byte_dot") != AVX2.lowering("byte_dot")
    assert AVX2_VNNI.lowering("lookup16") == AVX2.lowering("lookup16")
    assert NEON_DOTPROD.lowering("lookup16") == NEON.lowering("lookup16")
    assert AVX512_VBMI.lowering("pair_dot") == AVX512_BF16.lowering("pair_dot")
    assert AMX.extends is AVX512_BF16, "VSCALEFPS takes the multipliers' ports there"
    assert AMX.lowering("lookup_low4") == AVX512_VBMI.lowering("lookup_low4")
    assert AMX.lowering("times_power") == OPS["times_power"].lower
    assert AVX512.extends is AVX2, "a processor with AVX-512 need not have the VEX form"
    assert PORTABLE.lowering("pair_dot") == OPS["pair_dot"].lower
    assert AVX2.all_features < AVX512.all_features < _VNNI < _BF16 < _VBMI < AMX.all_features


def test_a_rewrite_sees_the_finished_text() -> None:
    seen: list[str] = []

    def rewrite(text: str) -> str:
        seen.append(text)
        return text + "\n; rewritten"

    tier = dataclasses.replace(PORTABLE, name="rewriting", rewrite=rewrite)
    text = build_module([("f", 1, lambda emit, _: None)], tier, "rewritten")
    assert text == seen[0] + "\n; rewritten" and "define void" in text


# no kernel and no driver knows a tier

_ROOT = Path(hybrid_moe.cpu_kernels.__path__[0])
_FILES = sorted(p for room in ("kernels", "drivers") for p in (_ROOT / room).glob("*.py"))
_FORBIDDEN = re.compile(
    r"(?i)\b(portable|avx\w*|sse\d?|vnni|amx\w*|neon\w*|sve2?|[xyz]mm|v?pshufb|v?pmadd\w+"
    r"|vpdpbusds?|v?dpbf16ps|vpermw|vfmadd\w*|tdpb\w+|[us]{1,2}dot|bfdot|llvm\.(x86|aarch64)\.[\w.]+)\b"
)
_BASELINE = {
    *("llvm.x86.sse2.pause", "llvm.x86.sse.ldmxcsr", "llvm.x86.sse.stmxcsr"),
    *("llvm.aarch64.hint", "llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr"),
}
"""Instructions that every processor of its kind has, used by the drivers."""


def _words_of_code(path: Path) -> list[str]:
    """Names, attributes, imports and strings of a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(node, documented) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings.add(id(statement.value))
    words = []
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if isinstance(value, str) and id(node) not in docstrings and name != "type_comment":
                words.append(value)
    return words


def test_the_search_finds_names() -> None:
    for text in (
        *TIERS,
        "llvm.x86.avx512.vpdpbusd.512",
        "AVX512",
        "if tier == portable",
        "tdpbssd",
    ):
        assert _FORBIDDEN.search(text)
    for text in ("report", "assert", "messenger"):
        assert not _FORBIDDEN.search(text)


@pytest.mark.parametrize("path", _FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_kernel_names_a_tier(path: Path) -> None:
    words = set(_words_of_code(path)) - _BASELINE
    assert [word for word in words if _FORBIDDEN.search(word)] == []


def test_kernels_are_found() -> None:
    assert {"dot", "encode", "epilogue", "worker"} <= {path.stem for path in _FILES}


# what the compiler makes of it


@functools.cache
def _functions(fmt: str, tier: Tier) -> Mapping[str, str]:
    """Function -> its assembly."""
    text = assembly(build_module(functions_of(fmt, tier), tier, "assembly"), tier.target)
    parts = re.split(r"^(\w+):$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("fmt", "tier", "kernel", "instructions"),
    [
        ("MXFP4", AVX2, "direct", {"vpmaddubsw": "ymm", "vpshufb": "ymm", "vpmaddwd": "ymm"}),
        ("MXFP4", AVX2, "tiled", {"vpmaddubsw": "ymm"}),
        ("MXFP4", AVX2_VNNI, "direct", {"{vex}\tvpdpbusd": "ymm", "vpshufb": "ymm"}),
        ("MXFP4", AVX2_VNNI, "tiled", {"{vex}\tvpdpbusd": "ymm"}),
        ("MXFP4", AVX512, "direct", {"vpmaddubsw": "zmm", "vpshufb": "zmm", "vpmaddwd": "zmm"}),
        ("MXFP4", AVX512, "tiled", {"vpmaddubsw": "zmm"}),
        ("MXFP4", AVX512_VNNI, "direct", {"vpdpbusd": "zmm", "vpshufb": "zmm"}),
        ("MXFP4", AVX512_VNNI, "tiled", {"vpdpbusd": "zmm"}),
        ("MXFP4", AVX512_BF16, "direct", {"vpdpbusd": "zmm", "vpshufb": "zmm"}),
        ("MXFP4", AVX512_BF16, "tiled", {"vpdpbusd": "zmm"}),
        ("MXFP4", AVX512_VBMI, "direct", {"vpdpbusd": "zmm", "vpermb": "zmm"}),
        ("MXFP4", AVX512_VBMI, "direct[2-6]", {"vscalefps": "zmm"}),
        ("MXFP4", AVX512_VBMI, "tiled", {"vpdpbusd": "zmm", "vscalefps": "zmm"}),
        ("INT8", AVX2, "direct", {"vpmaddwd": "ymm", "vcvtph2ps": "ymm"}),
        ("INT8", AVX2_VNNI, "direct", {"{vex}\tvpdpbusd": "ymm", "vcvtph2ps": "ymm"}),
        ("INT8", AVX512, "direct", {"vpmaddwd": "zmm", "vcvtph2ps": "zmm"}),
        ("INT8", AVX512_VNNI, "direct", {"vpdpbusd": "zmm", "vcvtph2ps": "zmm"}),
        ("INT8", AVX512_VBMI, "direct[2-6]", {"vpdpbusd": "zmm", "vscalefps": "zmm"}),
        ("BF16", AVX2, "direct", {"vfmadd": "ymm"}),
        ("BF16", AVX512, "direct", {"vfmadd": "zmm"}),
        ("BF16", AVX512_BF16, "direct", {"vdpbf16ps": "zmm"}),
    ],
    ids=lambda value: value.name if isinstance(value, Tier) else None,
)
def test_instructions(fmt: str, tier: Tier, kernel: str, instructions: dict[str, str]) -> None:
    """Dot kernels of every tile size contain the instructions that the tier is named for."""
    functions = _functions(fmt, tier)
    dots = [body for name, body in functions.items() if re.fullmatch(kernel + r"\d*", name)]
    assert dots
    for body in dots:
        for mnemonic, register in instructions.items():
            lines = [line for line in body.splitlines() if mnemonic in line]
            assert any(f"%{register}" in line for line in lines), mnemonic


@pytest.mark.parametrize(
    "name", [name for name, t in TIERS.items() if "neon" not in t.all_features]
)
def test_portable_code_needs_nothing(name: str) -> None:
    """Each tier's code stays within its registers: no wider ones, and none for `portable`."""
    text = "\n".join(_functions("MXFP4", TIERS[name]).values())
    widths = {128: "xmm", 256: "ymm", 512: "zmm"}
    for bits, register in widths.items():
        assert (f"%{register}" in text) or bits != TIERS[name].vector_bits
        assert (f"%{register}" not in text) or bits <= TIERS[name].vector_bits
