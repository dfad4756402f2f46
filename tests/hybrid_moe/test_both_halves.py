"""A wrapper with a GPU back end computes every expert, wherever it is: the torch back end on CPU
tensors, so all but the kernels is real."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels import slot_experts
from hybrid_moe.gpu_kernels.gemm_config import TOKEN_TILES
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts, check_experts, has_wide_scales
from hybrid_moe.runtime import gpu_arguments, hot_half
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.gpu_faults import GpuLostError, lost_gpu
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.wrapper import KTMoEWrapper
from tests.cpu_kernels.cases import ACTIVATION_ERROR, Case
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures
from tests.reference import FIXED_POINT_ERROR, added, assert_within

POOLS = range(1, min(2, usable_cores()) + 1)
WEIGHTS = Weights.random(bias=True)
SIGNATURES = signature_weights()


def mask_of(*hot: int) -> torch.Tensor:
    return torch.isin(torch.arange(E), torch.tensor(hot, dtype=torch.long))


def hybrid(weights: Weights, *hot: int, pools: int = 1, **arguments: Any) -> KTMoEWrapper:
    made = wrapper(
        gpu_experts_mask=mask_of(*hot),
        gpu_backend="torch",
        gpu_device="cpu",
        cpuinfer_threads=pools,
        threadpool_count=pools,
        **arguments,
    )
    return weights.load(made)


def expert_nbytes(w: KTMoEWrapper) -> int:
    """Packed bytes of one expert, all pools."""
    return sum(w._layer.expert_nbytes(pool) for pool in range(w.pool.pools))


@functools.lru_cache(maxsize=64)
def batch(tokens: int) -> Batch:
    made = Batch.random(tokens)
    if tokens > 2:
        made.ids[1, 0], made.ids[2] = -1, torch.tensor([E, -7, 1 << 40])
    return made


OTHERS = (
    FORMATS["INT4_G32_BF16"],
    FORMATS["INT8_ROW_FLOAT32"],
    LayerFormats(FORMATS["INT4_ROW_FLOAT32"], FORMATS["INT8"]),
)


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("fmt", [*DENSE_FORMATS.values(), *OTHERS], ids=lambda f: f.name)
def test_result(fmt: WeightFormat | LayerFormats, pools: int) -> None:
    """Within the bound of the contract: some experts hot, all, none; ids out of range, no token."""
    formats = layer_formats(fmt)
    error = max(ACTIVATION_ERROR.get(f.name, FIXED_POINT_ERROR) for f in formats)
    for hot in ((0, 3, 4), range(E), ()):
        w = hybrid(WEIGHTS, *hot, pools=pools, formats=formats)
        assert w.gpu_nbytes == len(hot) * expert_nbytes(w)
        for tokens in (0, 1, 40):
            expected = WEIGHTS.expected(batch(tokens), formats, activation_error=error)
            out = w.forward(*batch(tokens).args)
            assert out.dtype == torch.bfloat16
            assert_within(out.double().numpy(), expected)
        w.close()


def test_a_long_prompt_has_the_bits_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of pairs are kept for some tokens at a time; what is added up first is rounded last."""
    given, w = signature_batch(40, seed=3), hybrid(SIGNATURES, 0, 3, 4)
    whole = w.forward(*given.args)
    assert torch.equal(whole, signatures(given))
    for most in (40, 39, 7):
        monkeypatch.setattr(hot_half, "AT_ONCE", most)
        monkeypatch.setattr(slot_experts, "AT_ONCE", most)
        assert torch.equal(w.forward(*given.args), whole)
    w.submit_forward(*given.args)
    w.demote(0)  # counts for the next batch only
    assert torch.equal(w.sync_forward(given.hidden), whole)
    w.close()


@pytest.mark.parametrize("tokens", [1, 6])
def test_ranks_share_the_experts(tokens: int) -> None:
    """The sum over ranks is the whole: one has the CPU's experts and some slots, another slots
    alone, a third nothing that any token wants."""
    mine, theirs, empty = (0, 5), (2, 3, 7), ()
    everybody = mask_of(*mine, *theirs)
    leader = hybrid(SIGNATURES, *mine, elsewhere=mask_of(*theirs))
    other = hybrid(SIGNATURES, *theirs, elsewhere=~mask_of(*theirs))
    nobody = hybrid(SIGNATURES, *empty, elsewhere=torch.ones(E, dtype=torch.bool))
    given = signature_batch(tokens, seed=tokens)
    parts = [w.forward(*given.args) for w in (leader, other, nobody)]
    assert torch.equal(torch.stack(parts).sum(0), signatures(given))
    assert torch.equal(parts[1], signatures(given, mask_of(*theirs)))
    assert not parts[2].any()
    assert other.nbytes == nobody.nbytes == nobody.gpu_nbytes == 0
    here = int(((given.ids >= 0) & ~everybody[given.ids]).sum())
    assert leader.pairs[1] == here and other.pairs[1] == 0
    with pytest.raises(ValueError, match="expert 2 is elsewhere"):
        leader.promote(2)


def move_something(w: KTMoEWrapper, rng: np.random.Generator) -> None:
    """A random expert up, or down, or both ways; moves that are impossible are refused."""
    hot = w.gpu_experts_mask.clone()
    expert = int(rng.integers(E))
    try:
        (w.demote if hot[expert] else w.promote)(expert)
    except RuntimeError as error:
        assert "slots are taken" in str(error) or "no place on the CPU" in str(error)
        assert torch.equal(w.gpu_experts_mask, hot)
    else:
        assert w.gpu_experts_mask[expert] != hot[expert]


@pytest.mark.parametrize("pools", POOLS)
def test_experts_move_at_any_time(pools: int) -> None:
    """Between submissions, and between submit and sync: each pair counts once, with its weight, and
    a move copies the expert's bytes and nothing else."""
    w = hybrid(SIGNATURES, 1, 4, pools=pools, gpu_slots=3)
    runner = w._runner
    assert runner is not None and runner._halves is not None
    placement, rng, moves, counted = runner._halves[1], np.random.default_rng(pools), 0, [0, 0]
    for step in range(60):
        given = signature_batch(int(rng.integers(0, 9)), step)
        before, hot = placement.moved_bytes, w.gpu_experts_mask.clone()
        w.submit_forward(*(t.clone() for t in given.args))
        known = given.ids[given.ids >= 0]
        counted[0] += int(hot[known].sum())
        counted[1] += int((~hot[known]).sum())
        for _ in range(rng.integers(3)):
            move_something(w, rng)
        assert torch.equal(w.sync_forward(given.hidden), signatures(given))
        move_something(w, rng)
        moves = (placement.moved_bytes - before) // expert_nbytes(w)
        assert placement.moved_bytes - before == moves * expert_nbytes(w)
    assert w.pairs == tuple(counted) and min(counted) > 0
    assert len(set(placement._slot[placement._slot >= 0])) == int(w.gpu_experts_mask.sum())


def test_a_place_is_not_overwritten_under_a_job() -> None:
    """One thread, which works when it waits: the job has begun nothing when experts move."""
    w = hybrid(SIGNATURES, 0, 1, gpu_slots=3)
    given = signature_batch(3, 0)
    given.ids[:, 0] = 7
    w.submit_forward(*given.args)
    place = int(w._layer._place[7])
    w.promote(7)
    w.demote(0)
    assert w._layer._place[0] == place
    assert torch.equal(w.sync_forward(given.hidden), signatures(given))


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
def test_an_expert_that_has_moved_is_the_same(fmt: WeightFormat, pools: int) -> None:
    """Bit for bit that of a layer which was loaded so, biases and all."""
    w = hybrid(WEIGHTS, 1, 4, pools=pools, method=fmt.name)
    for down, up in ((1, 2), (4, 1), (2, 6)):
        w.demote(down)
        w.promote(up)
    fresh = hybrid(WEIGHTS, 1, 6, pools=pools, method=fmt.name)
    assert torch.equal(w.gpu_experts_mask, fresh.gpu_experts_mask)
    given = Batch.random(12, seed=3)
    assert torch.equal(w.forward(*given.args), fresh.forward(*given.args))


def test_deferred_experts() -> None:
    """Their sums come as they are to the next layer, which rounds once; experts may have moved in
    either meanwhile."""
    chain, rng = DeferralChain(), np.random.default_rng(0)
    layers = [
        hybrid(
            SIGNATURES,
            *hot,
            layer_idx=index,
            gpu_slots=4,
            max_deferred_experts_per_token=1,
            deferral_chain=chain,
        )
        for index, hot in enumerate([(0, 1), (2, 3)])
    ]
    for step in range(25):
        given = [signature_batch(3, seed=2 * step + i) for i in range(2)]
        outputs = []
        for w, each in zip(layers, given, strict=True):
            w.submit_forward(*each.args)
            move_something(layers[int(rng.integers(2))], rng)
            outputs.append(w.sync_forward(each.hidden))
            move_something(layers[int(rng.integers(2))], rng)
        assert torch.equal(outputs[0] + outputs[1], signatures(given[0]) + signatures(given[1]))


def test_deferral_is_within_its_bound() -> None:
    chain = DeferralChain()
    weights = [Weights.random(seed=seed) for seed in range(2)]
    layers = [
        hybrid(each, 0, 5, layer_idx=i, max_deferred_experts_per_token=1, deferral_chain=chain)
        for i, each in enumerate(weights)
    ]
    given = Batch.random(2, seed=8)
    outputs = [w.forward(*given.args) for w in layers]
    now, later = layers[0].select_deferred_experts(given.ids, given.weights, K - 1)
    later = torch.where(mask_of(0, 5)[later.clamp(min=0)], -1, later)  # hot ones wait for nobody
    now = torch.where(later >= 0, -1, given.ids)
    first = weights[0].expected(Batch(given.hidden, now, given.weights))
    rest = weights[0].expected(Batch(given.hidden, later, given.weights))
    assert_within(outputs[0].double().numpy(), first)
    assert_within(outputs[1].double().numpy(), added(weights[1].expected(given), rest))


def test_what_a_caller_may_not_do() -> None:
    w = hybrid(SIGNATURES, 0, 1)
    given = signature_batch(2, 0)
    for expert, value, message in (
        (5, True, r"gpu_experts_mask\[5\] was set to True, but expert 5 has no slot .* promote"),
        (0, False, r"gpu_experts_mask\[0\] was set to False, but expert 0 has no panels .* demote"),
    ):
        w.gpu_experts_mask[expert] = value
        with pytest.raises(RuntimeError, match=message):
            w.submit_forward(*given.args)
        w.gpu_experts_mask[expert] = not value
    assert torch.equal(w.forward(*given.args), signatures(given))
    with pytest.raises(ValueError, match="cannot be assigned with a gpu_backend"):
        w.gpu_experts_mask = mask_of(3)
    for call, error, message in (
        (lambda: w.promote(0), ValueError, "expert 0 is not on the CPU"),
        (lambda: w.demote(7), ValueError, "expert 7 is not on the GPU"),
        (lambda: w.promote(7), RuntimeError, "all 2 slots are taken"),
        (lambda: w.promote(E), IndexError, "must be in 0..7"),
        (lambda: w.demote(-1), IndexError, "must be in 0..7"),
        (lambda: w.promote(1.5), TypeError, "expert must be an integer"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            call()
    w.demote(0)
    with pytest.raises(RuntimeError, match="no place on the CPU is free for expert 1"):
        w.demote(1)
    assert torch.equal(w.forward(*given.args), signatures(given))
    w.close()
    w.close()
    with pytest.raises(RuntimeError, match="closed"):
        w.promote(2)
    plain = SIGNATURES.load(wrapper())
    with pytest.raises(RuntimeError, match="no gpu_backend"):
        plain.promote(2)
    every = hybrid(SIGNATURES, *range(E))
    with pytest.raises(RuntimeError, match="no place on the CPU"):
        every.demote(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gpu_backend": "triton"}, ValueError, "gpu_backend is 'triton', must be 'cute', 'torch'"),
        ({"gpu_slots": 2}, ValueError, "gpu_slots needs a gpu_backend"),
        ({"gpu_backend": "torch", "gpu_slots": 9}, ValueError, "gpu_slots is 9, must be from 2"),
        ({"gpu_backend": "torch", "gpu_slots": 1}, ValueError, "gpu_slots is 1, must be from 2"),
        ({"gpu_backend": "torch", "gpu_device": "mps"}, ValueError, "gpu_device is mps"),
        ({"gpu_backend": "cute", "gpu_device": "cpu"}, ValueError, "must be a CUDA device"),
        ({"gpu_backend": "torch", "elsewhere": mask_of(1)}, ValueError, "both True for expert 1"),
        ({"gpu_backend": "torch", "elsewhere": [1]}, TypeError, "elsewhere must be a bool tensor"),
        ({"elsewhere": mask_of(3)}, ValueError, "elsewhere needs a gpu_backend"),
        ({"gpu_backend": "torch", "num_experts": 2000}, ValueError, "num_experts is 2000"),
    ],
    ids=str,
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    device = {"gpu_device": "cpu"} if arguments.get("gpu_backend") == "torch" else {}
    given = {**device, **arguments}
    experts = int(given.get("num_experts", E))
    mask = torch.arange(experts) < 2
    with pytest.raises(error, match=message):
        wrapper(gpu_experts_mask=mask, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"gpu_backend='cute': .*GPU.*gpu_device='cpu'"):
        wrapper(gpu_experts_mask=mask_of(1), gpu_backend="cute")
    with pytest.raises(RuntimeError, match="gpu_backend='torch' needs a CUDA device"):
        wrapper(gpu_experts_mask=mask_of(1), gpu_backend="torch", gpu_device="cuda")
    made = wrapper(gpu_experts_mask=mask_of(1), gpu_backend="torch")
    assert made._hot is not None and made._hot.device.type == "cpu"


def test_from_a_checkpoint(tmp_path: Path) -> None:
    """Both halves are filled from the file, in the order of the map."""
    weights, mapping = Weights.random(seed=4), torch.arange(E).flip(0)
    path = weights.save(tmp_path)
    given = Batch.random(6)
    w = wrapper(
        gpu_experts_mask=mask_of(0, 6), gpu_backend="torch", gpu_device="cpu", weight_path=path
    )
    w.reserve_slots()
    half = w._hot
    assert half is not None and half.biases is False, "the checkpoint has none"
    w.load_weights(mapping)
    turned = Weights(weights.gate.flip(0), weights.up.flip(0), weights.down.flip(0))
    assert torch.equal(w.forward(*given.args), hybrid(turned, 0, 6).forward(*given.args))


def test_a_forked_child_moves_nothing() -> None:
    """It has neither the parent's workers nor its panels."""
    w = hybrid(SIGNATURES, 0, 1, gpu_slots=3)
    w.forward(*signature_batch(1, 0).args)
    child = os.fork()
    if child == 0:  # pragma: no cover
        refused = 0
        for move, expert in ((w.promote, 5), (w.demote, 0)):
            try:
                move(expert)
            except RuntimeError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_a_thousand_moves_take_no_memory() -> None:
    w = hybrid(SIGNATURES, 0, 1)
    given, process = signature_batch(2, 1), psutil.Process()

    def swaps(count: int) -> None:
        for i in range(count):
            w.demote(i % 2)
            w.promote(7 - i % 2)
            w.demote(7 - i % 2)
            w.promote(i % 2)
        assert torch.equal(w.forward(*given.args), signatures(given))

    swaps(50)
    before = process.memory_info().rss
    swaps(250)
    grown = process.memory_info().rss - before
    assert grown < 20 * expert_nbytes(w), "more than 1,000 moves of so many bytes may leave behind"
    assert w._layer.free_places == 1


def test_faults_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that says what to do; the next step starts clean."""
    w = hybrid(SIGNATURES, 0, 1)
    given = signature_batch(2, 1)
    for fault, message in (
        (torch.OutOfMemoryError("8 GiB"), "layer 0: cpu has no memory left .*gpu_slots"),
        (RuntimeError("CUDA error: an illegal memory access"), "layer 0: cpu has failed.*restart"),
        (RuntimeError("something else"), "something else"),
    ):
        for method in ("rows", "combine"):
            with monkeypatch.context() as patch:

                def fail(*_: object, fault: Exception = fault, **__: object) -> None:
                    raise fault

                patch.setattr(SlotExperts, method, fail)
                with pytest.raises(RuntimeError, match=message):
                    w.forward(*given.args)
            assert torch.equal(w.forward(*given.args), signatures(given))
    w.submit_forward(*given.args)
    w.reset()
    assert torch.equal(w.forward(*given.args), signatures(given))
    for move in (lambda: w.demote(1), lambda: w.promote(6)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", fail)
            with pytest.raises(RuntimeError, match="something else"):
                move()
        assert torch.equal(w.forward(*given.args), signatures(given))
        move()
        assert torch.equal(w.forward(*given.args), signatures(given))


def test_slots_that_are_reserved() -> None:
    """Before the weights are there; a load that fails leaves nothing behind."""
    made = wrapper(gpu_experts_mask=mask_of(1, 2), gpu_backend="torch", gpu_device="cpu")
    made.reserve_slots()
    taken = made.gpu_nbytes
    assert taken > 0
    WEIGHTS.load(made)
    assert made.gpu_nbytes == taken
    bad = Weights.random()
    bad.down[2, 0, 0] = float("nan")
    made = wrapper(gpu_experts_mask=mask_of(1, 2), gpu_backend="torch", gpu_device="cpu")
    with pytest.raises(Exception, match="NaN"):
        bad.load(made)
    assert made.gpu_nbytes == made.nbytes == 0
    given = signature_batch(3, 0)
    assert torch.equal(SIGNATURES.load(made).forward(*given.args), signatures(given))
    made = wrapper(gpu_experts_mask=mask_of(1, 2), gpu_backend="torch", gpu_device="cpu")
    made.reserve_slots(biases=False)
    with pytest.raises(ValueError, match="reserved without room"):
        WEIGHTS.load(made)


def test_kernels_that_a_layer_may_launch() -> None:
    """All of them are named, so that they can be compiled before a graph is captured; a format
    without kernels is refused by name."""
    half = hybrid(SIGNATURES, 0, 1)._hot
    assert half is not None and half.experts is not None
    found = half.experts.kernels(K, pdl=False)
    assert len(found) == len(set(found))
    counts = Counter(definition.name for definition in found)
    assert counts["gate_up"] == counts["down"] == len(TOKEN_TILES) and counts["combine"] == 6
    assert counts["pack_few"] == 2 * len(TOKEN_TILES) and counts["pack_scatter"] > 0
    odd = dataclasses.replace(MXFP4, name="ODD", scaling="odd")
    with pytest.raises(NotImplementedError, match="ODD has no GPU kernels yet"):
        check_experts("cute", odd, 64, 64)
    with pytest.raises(ValueError, match=r"moe_intermediate_size is 32768: .* of shared memory"):
        check_experts("cute", LayerFormats(MXFP4, FORMATS["FP8"]), 6144, 32768)
    check_experts("torch", DENSE_FORMATS["INT8"], 6144, 32768)


def test_a_mask_that_changes_before_the_weights_come() -> None:
    """What it says then counts, as without a back end; what cannot be is refused."""
    made = wrapper(
        gpu_experts_mask=mask_of(1, 2),
        gpu_backend="torch",
        gpu_device="cpu",
        elsewhere=mask_of(7),
    )
    made.gpu_experts_mask = mask_of(3, 4, 5)
    with pytest.raises(ValueError, match="puts 3 experts on the GPU, which has 2 slots"):
        SIGNATURES.load(made)
    made.gpu_experts_mask = mask_of(7)
    with pytest.raises(ValueError, match="True for expert 7, which is elsewhere"):
        SIGNATURES.load(made)
    made.gpu_experts_mask = mask_of(5)
    given = signature_batch(4, 0)
    out = SIGNATURES.load(made).forward(*given.args)
    assert torch.equal(out, signatures(given, ~mask_of(7)))
    made.promote(0)
    assert torch.equal(made.forward(*given.args), out)


def test_wide_scales() -> None:
    """Found per expert, and brought along when it moves."""
    case = Case.random(MXFP4, 64, 96, E=2)
    assert not has_wide_scales(MXFP4, case.experts[0])
    assert not has_wide_scales(MXFP4, case.with_scales(down=128).experts[0])
    assert has_wide_scales(MXFP4, case.with_scales(up=129).experts[0])
    others = LayerFormats(FORMATS["INT8"], MXFP4)
    assert not has_wide_scales(others, case.with_scales(up=129).experts[0])
    assert has_wide_scales(others, case.with_scales(down=129).experts[0])
    weights = Weights.random()
    weights.down[3] *= 1000
    w = hybrid(weights, 0, 3)
    slots = w._hot and w._hot.experts
    assert slots is not None and slots.wide.tolist() == [0, 1]
    w.demote(3)
    w.promote(5)
    w.demote(0)
    w.promote(3)
    assert [int(slots.wide[slot]) for slot in slots.slot_of[[3, 5]]] == [1, 0]


def test_loaded_in_inference_mode() -> None:
    """Experts of it move outside of that mode too; a device is what tensors call it."""
    with torch.inference_mode():
        w = hybrid(SIGNATURES, 0, 1, gpu_slots=3)
    w.promote(5)
    w.demote(0)
    given = signature_batch(3, 1)
    assert torch.equal(w.forward(*given.args), signatures(given))
    named = wrapper(gpu_experts_mask=mask_of(2), gpu_backend="torch", gpu_device="cpu:0")
    assert torch.equal(SIGNATURES.load(named).forward(*given.args), signatures(given))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="gpu_device is cuda:2, but torch finds 2 GPUs"):
        gpu_arguments._device("torch", "cuda:2")
    assert gpu_arguments._device("torch", "cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("message", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("cudaLaunchHostFunc failed: unspecified launch failure (error 719)", True),
        ("launching gate_up: CUDA_ERROR_ILLEGAL_ADDRESS (error 700): this kernel", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("CUDA error: invalid device ordinal", False),
        ("cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE (error 1)", False),
    ],
)
def test_which_errors_lose_the_gpu(message: str, fatal: bool) -> None:
    """Those of our own launches too, and none that only a call in the wrong place meets."""
    assert (lost_gpu("it", RuntimeError(message)) is not None) == fatal


def test_closing_with_a_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's memory is freed all the same."""
    w = hybrid(SIGNATURES, 0, 1)
    assert w._hot is not None

    def fail() -> None:
        raise GpuLostError("gone")

    monkeypatch.setattr(w._hot, "release", fail)
    with pytest.raises(GpuLostError):
        w.close()
    assert w.nbytes == 0


def test_experts_are_read_when_they_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    w = hybrid(SIGNATURES, 0, 1)
    calls: list[str] = []
    monkeypatch.setattr(ExpertPlacement, "wait", lambda self: calls.append("wait"))
    w.unpack(0)
    with pytest.raises(ValueError, match="gpu_tp_count"):
        w.submit_write_weight_scale_to_buffer(0, 3, [], [], [], [])
    assert len(calls) == 2
