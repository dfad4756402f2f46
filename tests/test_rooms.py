"""The rooms of the house: an import points down, and a name is given once.

docs/architecture.md draws the rooms. Imports inside functions and those for type checkers count
like any other: what a module needs to work, or to be read, is what it stands on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "hybrid_moe": "hybrid_moe",
    "hybrid_moe.cpu_kernels": "cpu_kernels",
    "hybrid_moe.gpu_kernels": "gpu_kernels",
    "hybrid_moe.loaders": "loaders",
}
"""Package -> its folder, as pyproject.toml maps them."""

LEVELS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("planning",),
    ("",),  # hybrid_moe/__init__.py, the face
    ("integrations.sglang", "integrations.transformers"),
    ("wrapper",),
    ("placement",),
    ("schedule",),
    ("runtime",),
    ("streams",),
    (
        "loaders",
        "gpu_kernels.slot_experts",
        "gpu_kernels.ops",
        "cpu_kernels.layer",
        "cpu_kernels.dense",
        "cpu_kernels.attention_job",
        "cpu_kernels.ceilings",
    ),
    (
        "gpu_kernels",  # a file for each kernel
        "cpu_kernels.streams",
        "cpu_kernels.descriptor",
        "cpu_kernels.experts",
        "cpu_kernels.matrix",
    ),
    (
        "cpu_kernels.job",
        "cpu_kernels.strips",
        "cpu_kernels.fingerprint",
        "cpu_kernels.placement_change",
        "gpu_kernels.toolchain",
    ),
    (
        "gpu_kernels.definition",
        "gpu_kernels.slot_layout",
        "gpu_kernels.fragments",
        "cpu_kernels.pool",
        "cpu_kernels.routing_split",
        "cpu_kernels.row_functions",
        "cpu_kernels.batch",
    ),
    ("cpu_kernels.trace", "cpu_kernels.use_counts"),
    ("cpu_kernels.memory", "cpu_kernels.kernels", "cpu_kernels.trace_file"),
    ("cpu_kernels.drivers", "cpu_kernels.dsl"),
    ("cpu_kernels.jit", "cpu_kernels.tuning"),
    ("formats",),
    ("parallel", "sysfiles"),
    ("binary_cache", "imported", "locks", "logs", "shared_libraries", "text"),
)
"""Rooms, the highest first. Those of one level know nothing of each other."""

UP: dict[tuple[str, str], str] = {}
"""Imports that point up all the same, and why."""

CYCLES: dict[tuple[str, ...], str] = {
    ("hybrid_moe.cpu_kernels.dsl.emit", "hybrid_moe.cpu_kernels.dsl.tiers"): (
        "Emit names the type of the tier that its ops are lowered for; a tier consists of "
        "lowerings, which are functions over Emit"
    ),
    ("hybrid_moe.streams.cuda", "hybrid_moe.streams.flags"): (
        "whether flags work is tried with a stream, and a stream asks whether they do"
    ),
    ("hybrid_moe.streams.buffers", "hybrid_moe.streams.staging"): (
        "the pool of buffers names the type of those whom it tells which buffers are freed"
    ),
}
"""Pairs of modules of one room whose imports go both ways, and why."""

TWICE = set[str]()
"""Classes of one name that are known."""


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = _modules()
TREES = {name: ast.parse(file.read_text("utf-8")) for name, file in MODULES.items()}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """What a module imports of this package, and in which line; relative imports are not used."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno} is a relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in within]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in MODULES)


def place(module: str) -> tuple[str, int]:
    """The room of a module and its level; the longest name of a room that fits."""
    within = module.removeprefix("hybrid_moe").removeprefix(".")
    levels = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
    parts = within.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        if room in levels:
            return room, levels[room]
    raise AssertionError(f"{MODULES[module]} is in no room: say in LEVELS where it stands")


PACKAGES_OF_ROOMS = {"hybrid_moe.cpu_kernels", "hybrid_moe.integrations"}
"""Their `__init__` imports nothing, and so stands in no room."""


def test_the_walk_sees_what_it_should() -> None:
    assert len(MODULES) > 100
    assert dict(imports("hybrid_moe.loaders.load"))["hybrid_moe.loaders.expert_source"] > 0
    lazy = dict(imports("hybrid_moe.cpu_kernels.drivers"))
    assert "hybrid_moe.cpu_kernels.jit.translate" in lazy  # within a function
    assert place("hybrid_moe.loaders.load") == ("loaders", place("hybrid_moe.loaders")[1])
    assert place("hybrid_moe")[0] == ""
    for name in PACKAGES_OF_ROOMS & MODULES.keys():
        assert not list(imports(name))


@pytest.mark.parametrize("module", sorted(MODULES.keys() - PACKAGES_OF_ROOMS))
def test_imports_point_down(module: str) -> None:
    room, level = place(module)
    for target, line in imports(module):
        if target in PACKAGES_OF_ROOMS or (module, target) in UP:
            continue
        below, its_level = place(target)
        assert room == below or level < its_level, (
            f"{MODULES[module].relative_to(ROOT)}:{line} imports {target} of "
            f"{below or 'the face'}, which is not below {room or 'the face'}"
        )


def test_within_a_room_imports_go_one_way() -> None:
    edges = {name: {target for target, _ in imports(name)} - {name} for name in MODULES}
    for module in MODULES:
        for target in edges[module]:
            pair = tuple(sorted((module, target)))
            if (
                module in edges[target]
                and (module, target) not in UP
                and (target, module) not in UP
            ):
                assert pair in CYCLES, f"{pair[0]} and {pair[1]} import each other"


def test_exceptions_are_needed() -> None:
    for module, target in UP:
        assert target in dict(imports(module)), f"{module} does not import {target} any more"
    for one, other in CYCLES:
        assert other in dict(imports(one)) and one in dict(imports(other))
    twice = {name for name, places in _classes().items() if len(places) > 1}
    assert twice >= TWICE, "remove from TWICE what is there once"


RECORDS = "hybrid_moe.cpu_kernels.drivers.records"
"""Declares memory that Python and compiled code share; a record is called like what fills it."""


def _classes() -> dict[str, list[str]]:
    """Modules of each class that others may name: not those of one module alone."""
    found: dict[str, list[str]] = {}
    for module in TREES.keys() - {RECORDS}:
        for node in TREES[module].body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    return found


def test_a_class_s_name_is_given_once() -> None:
    twice = {name: places for name, places in _classes().items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if name not in TWICE} == {}


def test_a_module_s_name_is_given_once() -> None:
    """But for commands, which are called like what they call, and `__init__`."""
    found: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        if file.name != "__init__.py" and not module.startswith("hybrid_moe.cli."):
            found.setdefault(file.name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
