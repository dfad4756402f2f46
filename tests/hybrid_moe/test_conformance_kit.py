"""The conformance kit fails implementations that break a clause, and survives one that crashes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.wrapper import KTMoEWrapper
from tests.conformance import test_deferral as deferral
from tests.conformance import test_forward as forward
from tests.conformance import test_loading as loading
from tests.conformance import test_placement as placement
from tests.conformance import test_process as process
from tests.conformance.kit import LAYERS, Kit, Weights, write_checkpoint
from tests.hybrid_moe import broken_wrappers as broken

ROOT = Path(__file__).parents[2]
Clause = Callable[[Kit], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Weights]]:
    weights = [Weights.random(layer) for layer in range(LAYERS)]
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), weights), weights


BROKEN: list[tuple[type[KTMoEWrapper], Clause]] = [
    (
        broken.KeepsReferences,
        lambda kit: forward.test_inputs_may_be_changed_in_place_right_after_submit(
            kit, "weights", 1
        ),
    ),
    (broken.NormalizesWeights, forward.test_weights_are_applied_as_they_are),
    (broken.WrapsIds, forward.test_ids_of_minus_one_contribute_nothing),
    (
        broken.ForgetsTheMap,
        lambda kit: loading.test_map_names_the_checkpoints_expert_of_each_id(kit, "shuffled"),
    ),
    (broken.HasOneResultForAll, forward.test_result_outlives_the_next_layer),
    (broken.FreezesTheMask, placement.test_mask_changed_in_place_holds_from_the_next_call),
    (
        broken.DropsDeferred,
        lambda kit: deferral.test_deferral_loses_nothing_over_all_layers(kit, 1, 2),
    ),
    (
        broken.IgnoresTheClamp,
        lambda kit: forward.test_swiglu_limit_clamps_gate_and_up(kit, 0.5),
    ),
    (
        broken.ClearsWhatIsUnderWay,
        process.test_clear_buffer_cache_loses_nothing_of_a_submission,
    ),
    (
        broken.SwallowsErrors,
        lambda kit: forward.test_bad_shape_raises_and_the_layer_works_afterwards(
            kit, "hidden_too_wide"
        ),
    ),
]


@pytest.mark.parametrize(("implementation", "clause"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_broken_implementation_fails_the_clause_that_it_breaks(
    implementation: type[KTMoEWrapper], clause: Clause, checkpoint: tuple[Path, list[Weights]]
) -> None:
    def run(wrapper: Any) -> None:
        kit = Kit(wrapper, hybrid_moe, torch.device("cpu"), *checkpoint)
        with torch.inference_mode():
            clause(kit)
        kit.close()

    run(KTMoEWrapper)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(implementation)


def test_a_crash_is_the_failure_of_one_clause() -> None:
    """Two clauses in processes of their own: the first crashes, the second runs and passes."""
    command = [sys.executable, "-m", "pytest", "tests/conformance/test_forward.py", "--isolate"]
    command += ["--implementation=tests.hybrid_moe.broken_wrappers:Crashes"]
    command += ["-k", "nothing_but_minus_one or submit_returns_nothing"]
    command += ["-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in ended.stdout, ended.stdout
    assert "the process crashed with SIGABRT" in ended.stdout
    assert "test_batch_of_nothing_but_minus_one_is_zero" in ended.stdout
