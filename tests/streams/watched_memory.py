"""Memory whose use after it is freed is found at once, and not by luck.

While it is watched, all memory of NumPy arrays and arenas is entered in a ledger. What is freed
keeps its place until the end and is filled with poison, so nothing else can come to lie there.
`Ledger.check` follows addresses from where compiled code and the GPU begin, as a conservative
garbage collector would: it knows no layouts, any word that is an address counts. If that leads to
freed memory, somebody could use it. At the end all poison must be intact.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from hybrid_moe.cpu_kernels import memory

POISON = 0xA5
_SCANNED = 1 << 15
"""Larger pieces hold data, and addresses in them are by chance."""
_LOG = 1 << 18

_ALLOCATOR = f"""
declare i8* @malloc(i64)
declare i8* @calloc(i64, i64)
declare i8* @realloc(i8*, i64)
declare i8* @memset(i8*, i32, i64)

define void @enter(i64* %log, i8* %at, i64 %size) {{
  %count = load i64, i64* %log
  %more = add i64 %count, 1
  store i64 %more, i64* %log
  %place = mul i64 %more, 2
  %first = getelementptr i64, i64* %log, i64 %place
  %address = ptrtoint i8* %at to i64
  store i64 %address, i64* %first
  %second = getelementptr i64, i64* %first, i64 1
  store i64 %size, i64* %second
  ret void
}}
define i8* @new(i64* %log, i64 %size) {{
  %at = call i8* @malloc(i64 %size)
  call void @enter(i64* %log, i8* %at, i64 %size)
  ret i8* %at
}}
define i8* @zeroed(i64* %log, i64 %count, i64 %item) {{
  %at = call i8* @calloc(i64 %count, i64 %item)
  %size = mul i64 %count, %item
  call void @enter(i64* %log, i8* %at, i64 %size)
  ret i8* %at
}}
define i8* @resized(i64* %log, i8* %old, i64 %size) {{
  call void @enter(i64* %log, i8* %old, i64 -1)
  %at = call i8* @realloc(i8* %old, i64 %size)
  call void @enter(i64* %log, i8* %at, i64 %size)
  ret i8* %at
}}
define void @gone(i64* %log, i8* %at, i64 %size) {{
  call i8* @memset(i8* %at, i32 {POISON}, i64 %size)
  call void @enter(i64* %log, i8* %at, i64 -2)
  ret void
}}
"""
# the log: a count, a word unused, then pairs of address and size; -1: moved, -2: freed, and kept


class UseAfterFreeError(AssertionError):
    """Freed memory can still be reached, or has been written to."""


class _Handler(ctypes.Structure):
    """PyDataMem_Handler, version 1 (NEP 49)."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("log", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 4),
    ]


@functools.cache
def _allocator() -> tuple[np.ndarray, Any]:
    """The log of what happens, and NumPy's handle of the compiled functions that write it. They
    must not run Python, since arrays are freed anywhere, and live as long as any array."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_ALLOCATOR)
    engine = llvm.create_mcjit_compiler(
        module, llvm.Target.from_default_triple().create_target_machine()
    )
    engine.finalize_object()
    log = np.zeros(2 * _LOG, np.int64)
    handler = _Handler(b"watched", 1, log.ctypes.data)
    names = ("new", "zeroed", "resized", "gone")
    handler.functions[:] = [engine.get_function_address(name) for name in names]
    for immortal in (engine, log, handler):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(immortal))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return log, new(ctypes.addressof(handler), b"mem_handler", None)


def _set_handler(capsule: Any) -> Any:
    """Make NumPy allocate by the handler in `capsule`; the one before."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(
        pointer(np._core._multiarray_umath._ARRAY_API, None),  # type: ignore[attr-defined]
        ctypes.POINTER(ctypes.c_void_p),
    )
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
    return kind(table[304])(capsule)  # PyDataMem_SetHandler, since NumPy 1.22


class Ledger:
    """What is allocated, and what has been."""

    def __init__(self, log: np.ndarray) -> None:
        self._log, self._read = log, 0
        log[0] = 0
        self._live: dict[int, int] = {}  # address -> size
        self._freed: dict[int, int] = {}
        self._watches: list[weakref.finalize[Any, Any]] = []
        self._unmapped: deque[tuple[int, int, int, object]] = deque()
        self._mappings: list[object] = []
        self._arrays = set[int]()  # freed, and still in place
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.unwatched: Any = None
        """NumPy's own handler, for what is none of the test's."""
        self.roots: list[Callable[[], Iterable[int]]] = []
        """Each gives addresses that compiled code or the GPU may use now."""

    def update(self) -> None:
        count = int(self._log[0])
        assert count < _LOG - 2, "too many allocations to watch"
        for address, size in self._log[2 * self._read + 2 : 2 * count + 2].reshape(-1, 2).tolist():
            if size >= 0:
                self._freed.pop(address, None)
                self._live[address] = size
            else:
                old = self._live.pop(address, 0)
                if size == -2:
                    self._freed[address] = old
                    self._arrays.add(address)
        changed = count != self._read or bool(self._unmapped)
        while self._unmapped:
            address, begin, nbytes, mapping = self._unmapped.popleft()
            del self._live[address]
            self._freed[begin] = nbytes
            self._mappings.append(mapping)
        if changed:
            self._read, self._index = count, None

    def arena(self, arena: memory.Arena) -> None:
        """Watch a mapping, which goes when the last array over it does."""
        whole = arena.bytes.base
        assert isinstance(whole, np.ndarray)
        address, size = int(whole.ctypes.data), whole.nbytes
        self.update()
        self._live[address], self._index = size, None
        self._watches.append(
            weakref.finalize(whole, self._unmap, address, arena.address, arena.nbytes, whole.base)
        )
        self._watches[-1].atexit = False

    def _unmap(self, address: int, begin: int, nbytes: int, mapping: object) -> None:
        ctypes.memset(begin, POISON, nbytes)
        self._unmapped.append((address, begin, nbytes, mapping))  # the collector may run anywhere

    def close(self) -> None:
        """Let freed memory go."""
        self.update()
        for watch in self._watches:
            watch.detach()
        libc = ctypes.CDLL(None)
        for address in self._arrays:
            libc.free(ctypes.c_void_p(address))
        self._mappings.clear()

    def live_bytes(self) -> int:
        """Of arrays and arenas."""
        self.update()
        return sum(self._live.values())

    def check(self) -> None:
        """Raise `UseAfterFreeError` if freed memory can be reached."""
        words = [address for root in self.roots for address in root()]
        handler = _set_handler(self.unwatched)
        try:
            self._follow(np.array(words, np.int64))
        finally:
            _set_handler(handler)

    def _follow(self, words: np.ndarray) -> None:
        self.update()
        if self._index is None:
            kept = [dict(self._live), dict(self._freed)]
            starts, sizes = (
                np.array([n for pieces in kept for n in numbers(pieces)], np.int64)
                for numbers in (dict.keys, dict.values)
            )
            order = starts.argsort()
            alive = order < len(kept[0])
            self._index = starts[order], (starts + sizes)[order], alive
        starts, ends, alive = self._index
        found = np.zeros(len(starts), np.bool_)
        while len(words):
            at = np.searchsorted(starts, words, "right") - 1
            hit = np.unique(at[(at >= 0) & (words < ends[at])])
            hit = hit[~found[hit]]
            found[hit] = True
            if not alive[hit].all():
                sizes = (ends - starts)[hit[~alive[hit]]].tolist()
                raise UseAfterFreeError(f"freed memory can still be reached: pieces of {sizes} B")
            pieces = zip(starts[hit].tolist(), ends[hit].tolist(), strict=True)
            parts = [_words(a, b) for a, b in pieces if b - a <= _SCANNED]
            words = np.concatenate(parts) if parts else words[:0]

    def check_poison(self) -> None:
        """Raise `UseAfterFreeError` if somebody has written to freed memory."""
        self.update()
        for address, size in self._freed.items():
            if ctypes.string_at(address, size) != bytes([POISON]) * size:
                raise UseAfterFreeError(f"somebody wrote to {size} freed bytes")


def _words(begin: int, end: int) -> np.ndarray:
    count = (end - begin) // 8
    return np.frombuffer((ctypes.c_int64 * count).from_address(begin), np.int64).copy()


@contextmanager
def watched() -> Iterator[Ledger]:
    """Watch what this thread allocates; at the end nobody has written to what was freed."""
    log, handle = _allocator()
    ledger = Ledger(log)
    real = memory.Arena.__init__

    def init(self: memory.Arena, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        ledger.arena(self)

    before = ledger.unwatched = _set_handler(handle)
    memory.Arena.__init__ = init  # type: ignore[method-assign]
    try:
        yield ledger
        ledger.check_poison()
    finally:
        memory.Arena.__init__ = real  # type: ignore[method-assign]
        _set_handler(before)
        ledger.close()
