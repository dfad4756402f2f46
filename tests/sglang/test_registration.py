"""What the plugin does to a process of SGLang, and when; on a stand-in for SGLang."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hybrid_moe.integrations.sglang import contract, late, plugin, step_faults
from hybrid_moe.integrations.sglang.contract import ContractError, Requirement
from hybrid_moe.integrations.sglang.step_faults import StepFaults

FAKE_SGLANG = {
    "srt/__init__.py": "",
    "srt/layers/moe/kt_ep_wrapper.py": """
        KTRANSFORMERS_AVAILABLE = False
        class KTEPWrapperMethod:
            def __init__(self, gpu_method, kt_config):
                self.made = (gpu_method, kt_config)
    """,
    "srt/layers/moe/fused_moe_triton/layer.py": """
        from sglang.srt.layers.moe.kt_ep_wrapper import KTEPWrapperMethod
        def fused_moe(): return KTEPWrapperMethod("gpu", kt_config="config")
    """,
    "srt/model_executor/runner/decode_cuda_graph_runner.py": "KTRANSFORMERS_AVAILABLE = False",
    "srt/managers/scheduler.py": """
        class Scheduler:
            def run_batch(self, batch): return "ran", batch
            def process_batch_result(self, batch, result): return "processed", batch, result
    """,
}
"""What `register` looks at, file by file; every other part of SGLang is missing."""


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """A package `sglang` of these files; gives the modules of it that are imported."""

    def imported() -> set[str]:
        return {name for name in sys.modules if name.partition(".")[0] == "sglang"}

    before = {name: sys.modules.pop(name) for name in imported()}
    for name, text in FAKE_SGLANG.items():
        file = tmp_path / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in [file.parent, *file.parent.relative_to(tmp_path).parents]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(textwrap.dedent(text))
    (tmp_path / "__init__.py").unlink(missing_ok=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = [f for f in sys.meta_path if type(f).__module__ != late.__name__]
    monkeypatch.setattr(sys, "meta_path", others)  # what another test registered waits no more
    yield imported
    for name in imported():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(params=["imported_before", "imported_after"])
def early(request: pytest.FixtureRequest) -> bool:
    """Whether SGLang's layers are imported before the plugin runs."""
    return bool(request.param == "imported_before")


class OurMethod:
    def __init__(self, gpu_method: Any, kt_config: Any) -> None:
        self.made = (gpu_method, kt_config)


def taking_over(monkeypatch: pytest.MonkeyPatch, *requirements: Requirement) -> None:
    """Let the plugin take over where `requirements` are the contract."""
    monkeypatch.setattr(plugin, "decide", lambda *args: plugin.Decision(True, "a test"))
    monkeypatch.setattr(contract, "installed_version", lambda: "0.5.23")
    monkeypatch.setattr(contract, "untested", lambda version: None)
    monkeypatch.setattr(contract.check, "__defaults__", (requirements,))
    fake = ModuleType("hybrid_moe.integrations.sglang.method")
    fake.KTEPWrapperMethod = OurMethod  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.mark.parametrize("ours", [False, True])
def test_a_server_without_the_options_sees_nothing(
    sglang: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, early: bool, ours: bool
) -> None:
    """No import, no hook, no log line: neither at registration nor when layers are imported."""
    if early:
        importlib.import_module(contract.LAYER_MODULE)
        importlib.import_module("sglang.srt.managers.scheduler")
    taking_over(monkeypatch, Requirement("no_such:X", "must not be looked at"))
    if not ours:
        monkeypatch.setattr(plugin, "decide", lambda *args: plugin.Decision(False, "a test"))
    before = sglang()
    plugin.register()
    assert sglang() == before
    importlib.import_module(contract.LAYER_MODULE)
    scheduler = importlib.import_module("sglang.srt.managers.scheduler").Scheduler
    assert contract.GRAPH_MODULE not in sglang()
    upstream = sys.modules[contract.KT_MODULE]
    assert not upstream.KTRANSFORMERS_AVAILABLE  # type: ignore[attr-defined]
    assert scheduler.run_batch.__module__ == scheduler.__module__
    assert not hasattr(scheduler.run_batch, "__wrapped__")
    assert not hasattr(scheduler.process_batch_result, "__wrapped__")


def test_the_first_method_takes_over(
    sglang: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, early: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if early:
        importlib.import_module(contract.LAYER_MODULE)
    taking_over(monkeypatch, Requirement(f"{contract.LAYER_MODULE}:fused_moe", "a test"))
    steps: list[str] = []
    for name in ("before_step", "before_results"):
        monkeypatch.setattr(
            StepFaults, name, lambda self, *args, name=name, **kwargs: steps.append(name)
        )
    plugin.register()
    layer = importlib.import_module(contract.LAYER_MODULE)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        for _ in range(2):
            method = layer.fused_moe()
            assert type(method) is OurMethod and method.made == ("gpu", "config")
    assert caplog.messages == ["hybrid_moe serves --kt-* of SGLang 0.5.23: a test"]
    assert layer.KTEPWrapperMethod is OurMethod
    for name in (contract.KT_MODULE, contract.GRAPH_MODULE):
        module: Any = sys.modules[name]
        assert module.KTRANSFORMERS_AVAILABLE
        assert module.KTMoEWrapper.__name__ == "KTMoEWrapper"
    # models keep SGLang's own class
    assert sys.modules[contract.KT_MODULE].KTEPWrapperMethod is not OurMethod  # type: ignore[attr-defined]
    step_faults.install()  # again: a step is told once
    scheduler = importlib.import_module("sglang.srt.managers.scheduler").Scheduler()
    assert scheduler.run_batch(7) == ("ran", 7)
    assert scheduler.process_batch_result(7, result=8) == ("processed", 7, 8)
    assert steps == ["before_step", "before_results"]


def test_standing_back_is_said_to_who_uses_the_options(
    sglang: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, early: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if early:
        importlib.import_module(contract.LAYER_MODULE)
    monkeypatch.setenv(plugin.SWITCH, "0")
    plugin.register()
    layer = importlib.import_module(contract.LAYER_MODULE)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        for _ in range(2):
            method = layer.fused_moe()
            assert method.made == ("gpu", "config")
    assert type(method).__module__ == contract.KT_MODULE
    assert caplog.messages == [f"hybrid_moe leaves --kt-* to others: {plugin.SWITCH}=0"]


def test_a_changed_contract_reaches_who_uses_the_options(
    sglang: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    if early:
        importlib.import_module(contract.LAYER_MODULE)
    taking_over(monkeypatch, Requirement("no_such:X", "a test"))
    plugin.register()
    layer = importlib.import_module(contract.LAYER_MODULE)
    for _ in range(2):
        with pytest.raises(ContractError, match="no_such"):
            layer.fused_moe()
    assert contract.GRAPH_MODULE not in sglang()


def test_an_sglang_without_the_method_is_left_alone(
    sglang: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = importlib.import_module(contract.LAYER_MODULE)
    del layer.KTEPWrapperMethod
    taking_over(monkeypatch)
    plugin.register()
    assert not hasattr(layer, "KTEPWrapperMethod")
