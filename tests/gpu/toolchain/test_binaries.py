"""Kernels come from memory, from the cache or from compilers in other processes."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybrid_moe import binary_cache
from hybrid_moe.gpu_kernels.definition import Argument, Artifacts, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import CompileError, binaries, compiled, kernel_sources, warm
from hybrid_moe.gpu_kernels.toolchain.compile_process import Compiler
from hybrid_moe.gpu_kernels.toolchain.cubin import read_resources
from hybrid_moe.gpu_kernels.toolchain.parameters import parameter_places
from tests.gpu.toolchain.kernels import Scaling, scaling

ROOT = Path(__file__).parents[3]
ARCH = "sm_90"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has compiled nothing."""
    monkeypatch.setenv("HYBRID_MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(binary_cache, "_told", set())
    monkeypatch.setattr(binaries, "_known", {})
    monkeypatch.setattr(kernel_sources, "IMPORTED_AT", float("inf"))  # the checkout may be new
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    """A compiled kernel."""
    with Compiler() as compiler:
        return compiler.compile(scaling(), ARCH)


_LATER = """
import sys
sys.path[:] = {path!r}
from hybrid_moe.gpu_kernels.toolchain import compiled, kernel_sources
from tests.gpu.toolchain.kernels import scaling
kernel_sources.IMPORTED_AT = float("inf")
binary = compiled(scaling(), "sm_90")
print(binary.entry, len(binary.cubin), binary.resources.registers, "cutlass" in sys.modules)
"""


def test_kernels_are_compiled_in_other_processes_and_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definitions = [scaling(), scaling(each=1), scaling()]
    before = sorted(Path.cwd().iterdir())
    four, one, again = warm(definitions, ARCH)
    assert again is four and compiled(scaling(), ARCH) is four
    assert one.entry in one.ptx and f".target {ARCH}" in one.ptx
    assert "ld.global.v4" in four.ptx and "ld.global.v4" not in one.ptx
    assert four.resources.local_bytes == 0 and 0 < four.resources.registers < 32
    assert sorted(Path.cwd().iterdir()) == before, "the DSL leaves nothing behind"
    assert len(list(cache.glob("*.cubin"))) == 2

    def no_compiler(*_: object) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(Compiler, "compile", no_compiler)
    monkeypatch.setattr(binaries, "_known", {})
    assert warm(definitions, ARCH) == [four, one, four]
    script = _LATER.format(path=[str(ROOT), *sys.path])
    later = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert later.stdout.split() == [
        four.entry, str(len(four.cubin)), str(four.resources.registers), "False",
    ], later.stderr  # fmt: skip


@pytest.mark.usefixtures("cache")
def test_what_another_process_compiles_is_waited_for(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a server begin together: one compiles, the others find it in the cache."""

    def no_compiler(*_: object) -> None:
        raise AssertionError("another process is at it")

    looked, fetched = threading.Event(), binaries.fetched

    def look(definition: KernelDefinition, arch: str) -> bool:
        found = fetched(definition, arch)
        looked.set()
        return found

    monkeypatch.setattr(binaries, "_compile", no_compiler)
    monkeypatch.setattr(binaries, "fetched", look)
    with ThreadPoolExecutor(1) as executor:
        with binary_cache.one_process():  # as the other process has it
            waiting = executor.submit(compiled, scaling(), ARCH)
            assert looked.wait(60)
            binaries.keep(scaling(), ARCH, artifacts)
            binaries._known.clear()
        assert waiting.result().cubin == artifacts.cubin


def test_a_compiler_that_crashes_is_an_error() -> None:
    """The message names kernel, configuration and architecture, and the next kernel is compiled by
    a new process."""
    endings = {
        "segmentation fault": "crashed .SIGSEGV.; its last words:\n(.|\n)*in _trouble",
        "exit": "ended with status 3; its last words:\nI have had enough",
        "error": "ValueError: no such instruction",
    }
    with Compiler() as compiler:
        for trouble, ending in endings.items():
            with pytest.raises(CompileError, match=ending) as raised:
                compiler.compile(scaling(trouble=trouble), ARCH)
            config = f"Scaling(each=4, threads=128, trouble={trouble!r})"
            assert str(raised.value).startswith(f"scale ({config}) for {ARCH} was not compiled: ")
        assert compiler.compile(scaling(), ARCH).cubin
    with Compiler(patience_s=0.2) as compiler, pytest.raises(CompileError, match=r"in 0\.2 s"):
        compiler.compile(scaling(trouble="endless"), ARCH)


def test_what_compiles_is_kept_when_others_fail(
    cache: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(self: Compiler, definition: KernelDefinition, arch: str) -> object:
        if definition.config.trouble:
            raise CompileError(f"{definition.config.trouble} happened")
        return artifacts

    monkeypatch.setattr(Compiler, "compile", compile)
    with pytest.raises(CompileError, match=r"(fire|flood) happened\n(fire|flood) happened"):
        warm([scaling(trouble="fire"), scaling(), scaling(trouble="flood")], ARCH)
    assert len(list(cache.glob("*.cubin"))) == 1
    assert compiled(scaling(), ARCH).cubin == artifacts.cubin


def test_a_definition_that_another_process_cannot_import() -> None:
    config = Scaling()
    here = dataclasses.replace(scaling(), build=lambda config: config)
    with Compiler() as compiler, pytest.raises(CompileError, match="must be able to import"):
        compiler.compile(here, ARCH)
    assert here.config == config


def test_damage_and_foreign_entries_cost_a_compilation(
    cache: Path,
    artifacts: Artifacts,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilations = []

    def counted(self: Compiler, definition: KernelDefinition, arch: str) -> object:
        compilations.append(definition)
        return artifacts

    monkeypatch.setattr(Compiler, "compile", counted)
    good = compiled(scaling(), ARCH)
    (entry,) = cache.glob("*.cubin")
    whole = entry.read_bytes()
    for payload in (b"", b"\xff\xff\xff\xff", whole[32:-3000], whole[32:].replace(b"ELF", b"FLE")):
        binaries._known.clear()
        compilations.clear()
        binary_cache.write(entry.name, payload)
        with caplog.at_level(logging.WARNING):
            assert compiled(scaling(), ARCH) == good
        assert len(compilations) == 1 and "will be rebuilt" in caplog.text
        assert entry.read_bytes() == whole
        caplog.clear()


def test_the_key_depends_on_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sources, "IMPORTED_AT", float("inf"))
    key = kernel_sources.binary_key
    keys = [
        key(scaling(), "sm_90"), key(scaling(), "sm_80"), key(scaling(each=1), "sm_90"),
        key(scaling(shared_bytes=64), "sm_90"),
        key(dataclasses.replace(scaling(), arguments=(Argument("x", "i32"),)), "sm_90"),
    ]  # fmt: skip
    monkeypatch.setattr(kernel_sources, "dsl_version", lambda: "4.8.1 cu13")
    keys.append(key(scaling(), "sm_90"))
    assert None not in keys and len(set(keys)) == len(keys)
    found = kernel_sources._sources(scaling().build.__module__)
    assert found is not None
    names = {file.name for file in found[0]}
    assert {"kernels.py", "definition.py"} <= names and "binaries.py" not in names


def test_no_key_for_sources_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has imported may not be what a compiler imports now."""
    monkeypatch.setattr(kernel_sources, "IMPORTED_AT", 0.0)
    assert kernel_sources.binary_key(scaling(), ARCH) is None


def test_without_the_dsl(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "dsl_version", lambda: None)
    with pytest.raises(CompileError, match=r"pip install \"hybrid-moe\[gpu\]\""):
        compiled(scaling(), ARCH)


def test_parameters_that_lie_elsewhere_are_refused(artifacts: Artifacts) -> None:
    wrong = dataclasses.replace(
        scaling(), arguments=(*scaling().arguments[:3], Argument("factor", "i64"))
    )
    assert parameter_places(wrong) == ((0, 8), (8, 8), (16, 4), (24, 8))
    with pytest.raises(ValueError, match=r"the code has parameters .*\(20, 4\)"):
        binaries._binary(wrong, ARCH, artifacts)
    with pytest.raises(ValueError, match="not a cubin with the kernel another"):
        read_resources(artifacts.cubin, "another")


def test_the_tested_version_is_the_pinned_one() -> None:
    pins = re.findall(r"nvidia-cutlass-dsl==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert {f"{pin} cu12" for pin in pins} == {kernel_sources.TESTED_DSL}
    assert f"nvidia-cutlass-dsl=={pins[0]}" in (ROOT / "constraints.txt").read_text()
