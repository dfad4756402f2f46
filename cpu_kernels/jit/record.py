"""Records: memory that Python and compiled drivers share, declared once.

    class Layer(Record):
        experts = i64
        gate_up = array(shared)              # address of words that other threads may change

    class Job(Record):
        layer = pointer(Layer)               # address of another record
        tokens = i64
        ids = array(i64)                     # address of int64 [any number]
        tasks = i64[PHASES, MAX_POOLS]       # in the record itself
        completed = shared_line              # a word that threads wait for, with a line to itself

In a driver, `job.tokens`, `job.layer.experts`, `job.ids[i]` and `job.tasks[phase, pool]` are read
and written like attributes (`jit.translate`), and so they are where a driver runs as Python, on the
memory at a record's address. A shared word has no value: it is passed to the atomics of
`drivers.intrinsics`. mypy checks both sides: the kinds below say what an attribute is.

Python makes a record by `Job.new()`, or lays it over memory (`Job.over(array)`) or an address
(`Job.at(address)`), and fills it in by names:

    job.tokens = 7                           # one field: 0.5 us
    fill = Job.writer("layer", "tokens")     # once: checks the names, and that the words adjoin
    fill(job.words, layer.address, 7)        # all of them at once: 0.5 us for seven
    job.words[Job.word("tokens")]            # a word by its index, as quick as a list
    Job.dtype                                # for NumPy: arrays of records, or views of memory

Fields lie in the order of declaration, each at the next multiple of its alignment.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

LINE = 64
"""Bytes of a cache line."""
_WORD = 8

T = TypeVar("T")
R = TypeVar("R", bound="Record")


class Word:
    """A word of 64 bits that threads share, by its address. Drivers read and write it by atomics
    only; `value` is for Python, whose plain loads and stores of a word are not torn."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    @property
    def value(self) -> int:
        return ctypes.c_int64.from_address(self.address).value

    @value.setter
    def value(self, value: int) -> None:
        ctypes.c_int64.from_address(self.address).value = value


class Kind(Generic[T]):
    """What a field holds; T is what the attribute is.

    Attributes:
        nbytes, alignment: of one.
        dtype: NumPy's.
    """

    nbytes: int = _WORD
    alignment: int = _WORD

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int64)

    def read(self, address: int) -> T:
        raise NotImplementedError

    def write(self, address: int, value: T) -> None:
        raise TypeError(f"{self} is not assigned to")

    def at(self, address: int) -> Array[T]:
        """The items of this kind that lie at an address."""
        return Array(address, self)

    def __getitem__(self, shape: int | tuple[int, ...]) -> Kind[Array[T]]:
        return Table(self, shape if isinstance(shape, tuple) else (shape,))

    if TYPE_CHECKING:  # the attribute of a record; `Record` puts a `Field` in its place

        def __get__(self, record: object, owner: object = None) -> T: ...
        def __set__(self, record: object, value: T) -> None: ...


class Array(Generic[T]):
    """Items of one kind, one behind the other from an address on: `shape` is that of a table inside
    a record, and None (one index, any number) of an array that a record points to."""

    __slots__ = ("address", "kind", "shape")

    def __init__(self, address: int, kind: Kind[T], shape: tuple[int, ...] | None = None) -> None:
        self.address, self.kind, self.shape = address, kind, shape

    def _at(self, index: int | tuple[int, ...]) -> int:
        if self.shape is None:
            if isinstance(index, tuple):
                raise IndexError("an array that a record points to has one index")
            return self.address + self.kind.nbytes * index
        indices = index if isinstance(index, tuple) else (index,)
        return self.address + self.kind.nbytes * _flat_index(indices, self.shape)

    def __getitem__(self, index: int | tuple[int, ...]) -> T:
        return self.kind.read(self._at(index))

    def __setitem__(self, index: int | tuple[int, ...], value: T) -> None:
        self.kind.write(self._at(index), value)


def _flat_index(indices: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Items before the one at `indices`, in C order."""
    if len(indices) != len(shape):
        raise IndexError(f"{len(indices)} indices for {len(shape)} dimensions")
    flat = 0
    for size, index in zip(shape, indices, strict=True):
        if not 0 <= index < size:
            raise IndexError(f"index {index} is not one of {size}")
        flat = flat * size + index
    return flat


@dataclass(frozen=True)
class Scalar(Kind[int]):
    """An integer; a driver's values have 64 bits, and what is stored is their low ones."""

    ctype: Any
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return ctypes.sizeof(self.ctype)

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.nbytes

    @property
    def signed(self) -> bool:
        return self.name != "u8"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.name == "f32" else self.ctype)

    def read(self, address: int) -> int:
        return int(self.ctype.from_address(address).value)

    def write(self, address: int, value: int) -> None:
        self.ctype.from_address(address).value = value


@dataclass(frozen=True)
class Shared(Kind[Word]):
    """A word that threads share; `nbytes` to the next one."""

    nbytes: int

    def __str__(self) -> str:
        return "a word that threads share"

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.nbytes

    @property
    def dtype(self) -> np.dtype[Any]:
        word = np.dtype(np.int64)
        if self.nbytes == _WORD:
            return word
        return np.dtype(
            {"names": ["word"], "formats": [word], "offsets": [0], "itemsize": self.nbytes}
        )

    def read(self, address: int) -> Word:
        return Word(address)


@dataclass(frozen=True)
class Pointer(Kind[R]):
    to: type[R]

    def __str__(self) -> str:
        return f"the address of {with_article(self.to.__name__)}"

    def read(self, address: int) -> R:
        return self.to.at(i64.read(address))

    def write(self, address: int, value: R) -> None:
        i64.write(address, value.address)


@dataclass(frozen=True)
class ArrayPointer(Kind[Array[T]]):
    of: Kind[T]

    def __str__(self) -> str:
        return f"the address of {self.of}s"

    def read(self, address: int) -> Array[T]:
        return Array(i64.read(address), self.of)

    def write(self, address: int, value: Array[T]) -> None:
        i64.write(address, value.address)


@dataclass(frozen=True)
class Inline(Kind[R]):
    record: type[R]

    def __str__(self) -> str:
        return f"{with_article(self.record.__name__)} within the record"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.record.nbytes

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.record.alignment

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.record.dtype

    def read(self, address: int) -> R:
        return self.record.at(address)


@dataclass(frozen=True)
class Table(Kind[Array[T]]):
    of: Kind[T]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.of}{list(self.shape)} within the record"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return math.prod(self.shape) * self.of.nbytes

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.of.alignment

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype((self.of.dtype, self.shape))

    def read(self, address: int) -> Array[T]:
        return Array(address, self.of, self.shape)


i64: Kind[int] = Scalar(ctypes.c_int64, "i64")
i32: Kind[int] = Scalar(ctypes.c_int32, "i32")
i8: Kind[int] = Scalar(ctypes.c_int8, "i8")
u8: Kind[int] = Scalar(ctypes.c_uint8, "u8")
f32: Kind[int] = Scalar(ctypes.c_int32, "f32")
"""A float, of which drivers only move the bits."""
shared: Kind[Word] = Shared(_WORD)
shared_line: Kind[Word] = Shared(LINE)


def pointer(to: type[R]) -> Kind[R]:
    """The address of a record, or 0."""
    return Pointer(to)


def array(of: Kind[T]) -> Kind[Array[T]]:
    """The address of items of a kind, or 0."""
    return ArrayPointer(of)


def inline(record: type[R]) -> Kind[R]:
    """A record by value."""
    return Inline(record)


class Field(Generic[T]):
    """A kind at its place: the attribute of a record."""

    def __init__(self, name: str, kind: Kind[T], offset: int) -> None:
        self.name, self.kind, self.offset = name, kind, offset

    def __get__(self, record: Record | None, owner: object = None) -> Any:
        return self if record is None else self.kind.read(record.address + self.offset)

    def __set__(self, record: Record, value: T) -> None:
        self.kind.write(record.address + self.offset, value)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


class _Slotted(type):
    """Instances take no attributes but fields: a misspelt one is an error."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> _Slotted:
        namespace.setdefault("__slots__", ())
        return super().__new__(cls, name, bases, namespace, **options)


class Record(metaclass=_Slotted):
    """The base of records, see the module."""

    __slots__ = ("_memory", "address")

    fields: ClassVar[Mapping[str, Field[Any]]] = MappingProxyType({})
    nbytes: ClassVar[int] = 0
    alignment: ClassVar[int] = _WORD
    dtype: ClassVar[np.dtype[Any]] = np.dtype([])

    def __init_subclass__(cls, alignment: int = _WORD) -> None:
        fields: dict[str, Field[Any]] = {}
        end = 0
        for name, kind in list(vars(cls).items()):
            if not isinstance(kind, Kind):
                continue
            if hasattr(Record, name):
                raise TypeError(f"{cls.__name__}.{name}: every record has a `{name}` already")
            offset = -(-end // kind.alignment) * kind.alignment
            fields[name] = Field(name, kind, offset)
            setattr(cls, name, fields[name])
            end, alignment = offset + kind.nbytes, max(alignment, kind.alignment)
        cls.fields = MappingProxyType(fields)
        cls.alignment = alignment
        cls.nbytes = -(-end // alignment) * alignment
        placed = fields.values()
        cls.dtype = np.dtype(
            {
                "names": list(fields),
                "formats": [field.kind.dtype for field in placed],
                "offsets": [field.offset for field in placed],
                "itemsize": cls.nbytes,
            }
        )

    def __init__(self, address: int, memory: npt.NDArray[np.uint8] | None = None) -> None:
        self.address, self._memory = address, memory

    @classmethod
    def at(cls: type[R], address: int) -> R:
        """The record at an address, which somebody else keeps."""
        return cls(address)

    @classmethod
    def over(cls: type[R], memory: npt.NDArray[np.uint8]) -> R:
        """The record at the start of `memory` (uint8), which it keeps alive."""
        if memory.nbytes < cls.nbytes:
            held = f"{memory.nbytes} bytes do not hold {with_article(cls.__name__)}"
            raise ValueError(f"{held}: {cls.nbytes}")
        return cls(int(memory.ctypes.data), memory[: cls.nbytes])

    @classmethod
    def new(cls: type[R]) -> R:
        """A record of zeros."""
        memory = np.zeros(cls.nbytes + cls.alignment, np.uint8)
        start = -int(memory.ctypes.data) % cls.alignment
        return cls.over(memory[start : start + cls.nbytes])

    def copy(self: R) -> R:
        """A record of its own with the same content."""
        made = type(self).new()
        ctypes.memmove(made.address, self.address, self.nbytes)
        return made

    @property
    def words(self) -> memoryview:
        """Its memory as int64, which is kept alive; only of what `new` or `over` has made."""
        assert self._memory is not None, "the memory of a record that is elsewhere is not known"
        return self._memory.data.cast("q")

    @classmethod
    def word(cls, name: str) -> int:
        """The index of a field, or of the first word of a table, in `words`."""
        field = cls._field(name)
        if field.kind.alignment % _WORD:
            raise TypeError(f"{cls.__name__}.{name} is no word but {field.kind}")
        return field.offset // _WORD

    @classmethod
    def offsets(cls) -> SimpleNamespace:
        """Byte offsets by field, and `nbytes`: for kernels, whose language has addresses only."""
        return SimpleNamespace(
            **{name: field.offset for name, field in cls.fields.items()}, nbytes=cls.nbytes
        )

    @classmethod
    def writer(cls, *names: str) -> Callable[..., None]:
        """A function that writes int64s to fields: `write(words, *values)`.

        Raises:
            AttributeError: no such field. TypeError: they do not adjoin in this order.
        """
        first = cls.word(names[0])
        for place, name in enumerate(names):
            if cls.word(name) != first + place or cls._field(name).kind.nbytes != _WORD:
                raise TypeError(f"{cls.__name__}.{name} is not the word behind those before it")
        pack, offset = struct.Struct(f"={len(names)}q").pack_into, _WORD * first

        def write(words: memoryview, *values: int) -> None:
            pack(words, offset, *values)

        return write

    @classmethod
    def _field(cls, name: str) -> Field[Any]:
        if name not in cls.fields:
            raise AttributeError(f"{cls.__name__} has no field `{name}`")
        return cls.fields[name]
