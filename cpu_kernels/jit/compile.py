"""LLVM IR text -> machine code in memory, through the object cache.

The key of a cached object is the hash of all that shapes it: the final IR, the target's CPU and
feature strings, the LLVM version, this file (it chooses the passes) and our ABI number. Building
the IR in Python takes longer than all else in a warm start, so a second kind of entry maps the
sources that the IR comes from to the object's key. MCJIT only links what is already compiled.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from hybrid_moe import binary_cache
from hybrid_moe.locks import ProcessLock

logger = logging.getLogger(__name__)

ABI = 6
"""Raise when the meaning of an address or descriptor that compiled code sees changes."""

try:
    _THIS_FILE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # as imported
except OSError as error:
    raise ImportError(
        "hybrid_moe compiles its kernels from its own Python source, and this installation lacks "
        f"it: install the package with its files ({error})"
    ) from error

_compile_lock = ProcessLock()  # LLVM's contexts as llvmlite uses them are not thread-safe
_keep_alive: list[llvm.ExecutionEngine] = []  # code is never unloaded: workers may be inside it


_FORK_PATIENCE_S = 10.0
_forking = threading.local()


def _llvm_lock() -> Any:
    """The lock that llvmlite takes for every call of LLVM; None where it has none that we know."""
    return getattr(getattr(llvm.ffi.lib, "_lock", None), "_lock", None)


def _let_compilations_end() -> None:
    """Before a fork: the child inherits LLVM's memory and the locks of LLVM and llvmlite as they
    are, so nobody may be inside LLVM then. Both locks are free afterwards in parent and child."""
    _forking.held = []
    for lock in (_compile_lock, _llvm_lock()):
        if lock is not None and lock.acquire(timeout=_FORK_PATIENCE_S):
            _forking.held.append(lock)
        elif lock is not None:
            logger.warning(
                "this process forks while a thread has compiled kernels for %g s: "
                "the child may not be able to compile any",
                _FORK_PATIENCE_S,
            )


def _in_parent() -> None:
    for lock in reversed(_forking.held):
        lock.release()


def _in_child() -> None:
    for lock in _forking.held:
        if lock is not _compile_lock:  # which is a new one
            lock.release()


os.register_at_fork(
    before=_let_compilations_end, after_in_parent=_in_parent, after_in_child=_in_child
)


@dataclass(frozen=True)
class Target:
    """What LLVM compiles for. `cpu` and `features` in LLVM's own spelling."""

    cpu: str
    features: str = ""

    @property
    def key(self) -> str:
        version = ".".join(map(str, llvm.llvm_version_info))
        triple = llvm.get_default_triple()
        return f"{ABI}|{_THIS_FILE}|{version}|{triple}|{self.cpu}|{self.features}"


@functools.lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@functools.lru_cache(maxsize=32)
def _machine(target: Target) -> llvm.TargetMachine:
    _initialize()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=target.cpu,
        features=target.features,
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )


_COMBINER_OPTION = "-x86-machine-combiner"
_COMBINER_VERSIONS = range(15, 23)  # LLVM ends the process over an option that it does not know


@functools.lru_cache(maxsize=1)
def _knows_combiner_option() -> bool:
    """Whether LLVM has the option, and needs it; says once where nobody knows."""
    if platform.machine() != "x86_64":
        return False
    version = llvm.llvm_version_info[0]
    if version in _COMBINER_VERSIONS:
        return True
    logger.warning(
        "LLVM %d is not one of %d to %d, whose option %s is known: sums may be reordered, which "
        "costs speed (a tenth was measured) and no exactness",
        version,
        _COMBINER_VERSIONS[0],
        _COMBINER_VERSIONS[-1],
        _COMBINER_OPTION,
    )
    return False


@contextmanager
def _in_written_order() -> Iterator[None]:
    """Code generation that keeps sums in the order in which kernels write them.

    The x86 back end's machine combiner turns (a + b) + c into a + (b + c) to shorten chains, which
    are not what limits a tile; its temporaries spill accumulators (measured: a tenth of the speed
    of a 16-register tier). The option is the process's own, so it is put back. Under the lock.
    """
    known = _knows_combiner_option()
    if known:
        llvm.set_option("hybrid_moe", f"{_COMBINER_OPTION}=0")
    try:
        yield
    finally:
        if known:
            llvm.set_option("hybrid_moe", f"{_COMBINER_OPTION}=1")


def dump_request() -> tuple[str, Path] | None:
    """`HYBRID_MOE_DUMP="asm DIR"` (or `ir DIR`, or with a colon) as (kind, directory)."""
    value = os.environ.get("HYBRID_MOE_DUMP", "").strip()
    if not value:
        return None
    kind, _, directory = value.replace(":", " ", 1).partition(" ")
    if kind not in ("asm", "ir") or not directory.strip():
        raise ValueError(f'HYBRID_MOE_DUMP must be "asm DIR" or "ir DIR", not {value!r}')
    return kind, Path(directory.strip())


def optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Clean the IR up, and nothing more: kernels are already in the order they should run in.

    -O3 would also reassociate integer sums into trees, which need more registers than there are:
    the tiles of 16-register machines then spill (measured: a third of their speed).
    """
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_loop_rotate_pass()
    passes.add_new_gvn_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_aggressive_dce_pass()
    passes.run(module, builder)


def optimize_program(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """The compiler's usual -O2, which inlines: for modules of many small functions."""
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)


def _parse(ir_text: str, machine: llvm.TargetMachine, program: bool = False) -> llvm.ModuleRef:
    module = llvm.parse_assembly(ir_text)
    module.triple = machine.triple
    module.verify()
    (optimize_program if program else optimize)(module, machine)
    return module


def assembly(ir_text: str, target: Target, program: bool = False) -> str:
    """The assembly that `target` gets for this IR; `program` as in `emit_object`."""
    with _compile_lock:
        machine = _machine(target)
        module = _parse(ir_text, machine, program)
        with _in_written_order():
            return str(machine.emit_assembly(module))


def emit_object(
    ir_text: str | Callable[[], str],
    target: Target,
    label: str,
    *,
    sources: str | None = None,
    program: bool = False,
) -> bytes:
    """Object code for this IR, from the cache when it is there.

    Args:
        ir_text: the IR, or what makes it; called only if it is needed.
        sources: what determines the IR, where that is known without making it.
        program: `optimize_program` instead of `optimize`.
    """
    make = functools.lru_cache(maxsize=1)(ir_text if callable(ir_text) else lambda: str(ir_text))
    shape = f"{target.key}|{program}"
    dump = dump_request()
    if dump is not None:
        _dump(make(), target, label, *dump, program)
    index = None if sources is None else f"{_digest(shape, sources)}.index"
    known = None if index is None else binary_cache.read(index)
    name = f"{_digest(shape, make())}.o" if known is None else known.decode()
    payload = binary_cache.read(name)
    if payload is None:
        text = make()
        name = f"{_digest(shape, text)}.o"
        with _compile_lock:
            machine = _machine(target)
            module = _parse(text, machine, program)
            with _in_written_order():
                payload = bytes(machine.emit_object(module))
        binary_cache.write(name, payload)
        logger.debug("compiled %s for %s", label, target.cpu)
    if index is not None and known != name.encode():
        binary_cache.write(index, name.encode())
    return payload


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _dump(
    ir_text: str, target: Target, label: str, kind: str, directory: Path, program: bool
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text, suffix = (ir_text, "ll") if kind == "ir" else (assembly(ir_text, target, program), "s")
    (directory / f"{label}.{suffix}").write_text(text)


def load_object(payload: bytes, names: Sequence[str]) -> Mapping[str, int]:
    """Link an object into this process; returns the address of each of `names`."""
    with _compile_lock:
        _initialize()
        empty = llvm.parse_assembly("")
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(empty, machine)
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(payload))
        engine.finalize_object()
        addresses = {name: engine.get_function_address(name) for name in names}
        _keep_alive.append(engine)
    missing = [name for name, address in addresses.items() if not address]
    if missing:
        raise RuntimeError(f"compiled object lacks the functions {', '.join(missing)}")
    return addresses


def compile_functions(
    ir_text: str | Callable[[], str],
    target: Target,
    names: Sequence[str],
    label: str,
    *,
    sources: str | None = None,
    program: bool = False,
) -> Mapping[str, int]:
    """Compile (or fetch) and load: address of each of `names`. Arguments as of `emit_object`."""
    try:
        payload = emit_object(ir_text, target, label, sources=sources, program=program)
        return load_object(payload, names)
    except RuntimeError as error:
        raise RuntimeError(f"{label}: {error}") from error
