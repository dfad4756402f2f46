"""Hostile input to `KTMoEWrapper` on the real kernels: an exception that names the thing, or the
result that the documentation promises; and the wrapper works afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import inspect_checkpoint
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, H, I, K, Weights, wrapper

WEIGHTS = Weights.random()
EXPERT = "layers.0.ffn.experts.5"
Tensors = dict[str, torch.Tensor]


# Checkpoints -------------------------------------------------------------------------------------


def edited(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    """Damage that rewrites the checkpoint's tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return edited(lambda tensors: tensors.update({key: change(tensors[key])}))


def wrong_index(folder: Path) -> None:
    weight_map = {f"{EXPERT}.w1.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()  # which would come first


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def nan_scale(scales: torch.Tensor) -> torch.Tensor:
    damaged = scales.view(torch.uint8).clone()
    damaged[-1, -1] = 255
    return damaged.view(scales.dtype)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (wrong_index, r"model-2\.safetensors: this shard is missing"),
    "truncated": (cut, r"model\.safetensors: truncated"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"<html>" * 99),
        r"model\.safetensors: a header of \d+ bytes",
    ),
    "config of another model": (
        lambda folder: (folder / "config.json").write_text('{"n_routed_experts": 9}'),
        "has 8 experts, config.json says n_routed_experts=9",
    ),
    "weight missing": (edited(lambda t: t.pop(f"{EXPERT}.w3.weight")), rf"{EXPERT}\.w3\.weight: "),
    "scale missing": (edited(lambda t: t.pop(f"{EXPERT}.w2.scale")), rf"{EXPERT}\.w2\.scale: "),
    "too few experts": (
        edited(lambda t: [t.pop(key) for key in list(t) if ".experts.7." in key]),
        r"map\[7\] = 7: the checkpoint has experts 0 to 6",
    ),
    "too many experts": (
        edited(lambda t: t.update({k.replace(".7.", ".8."): t[k].clone() for k in list(t)})),
        "num_experts is 8, but layer 0 of .* has 9 experts",
    ),
    "wrong shape": (
        replaced(f"{EXPERT}.w1.weight", lambda w: w[:-32].clone()),
        rf"{EXPERT}\.w1\.weight in .*shape \(64, 32\), expected \(96, 32\)",
    ),
    "wrong dtype": (
        replaced(f"{EXPERT}.w1.weight", lambda w: w.float()),
        rf"{EXPERT}\.w1\.weight in .*dtype F32",
    ),
    "wrong group count": (
        replaced(f"{EXPERT}.w2.scale", lambda s: s[:, :-1].clone()),
        rf"{EXPERT}\.w2\.scale in .*shape \(64, 2\), expected \(64, 3\)",
    ),
    "NaN scale": (replaced(f"{EXPERT}.w3.scale", nan_scale), rf"{EXPERT}\.w3\.scale.*scale is 255"),
}


@pytest.fixture(autouse=True)
def _forget_checkpoints() -> Iterator[None]:
    yield
    KTMoEWrapper.force_release_loader()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_and_its_repair(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    WEIGHTS.save(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    damage(tmp_path)
    w, batch = wrapper(weight_path=tmp_path), Batch.random()
    with pytest.raises(ValueError, match=message):
        w.load_weights()
    assert not w.loaded and w.nbytes == 0
    with pytest.raises(RuntimeError, match="layer 0 has no weights"):
        w.forward(*batch.args)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    (tmp_path / "model.safetensors").write_bytes(good)  # seen although nobody released the loader
    w.load_weights()
    assert torch.equal(w.forward(*batch.args), WEIGHTS.load(wrapper()).forward(*batch.args))


def test_a_checkpoint_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    """Offsets of the old file would give garbage, silently."""
    batch, other = Batch.random(), Weights.random(seed=8)
    first, second = (wrapper(weight_path=WEIGHTS.save(tmp_path)) for _ in range(2))
    first.load_weights()
    other.save(tmp_path)
    edited(lambda t: t.update(before=torch.zeros(1000)))(tmp_path)  # moves every offset
    second.load_weights()
    assert torch.equal(second.forward(*batch.args), other.load(wrapper()).forward(*batch.args))


def test_path_of_something_else(tmp_path: Path) -> None:
    for path, message in (("/dev/null", "no regular file"), (tmp_path, r"no \*\.safetensors")):
        with pytest.raises(CheckpointError, match=message):
            wrapper(weight_path=path).load_weights()


@pytest.mark.parametrize("value", [1, ["x", None, 3], {"a": 1}, True])
def test_inspect_takes_any_config(tmp_path: Path, value: Any) -> None:
    config = dict.fromkeys(("model_type", "architectures", "num_hidden_layers"), value)
    (WEIGHTS.save(tmp_path) / "config.json").write_text(json.dumps(config))
    summary = inspect_checkpoint(tmp_path)
    assert summary.num_experts == E and summary.problems == ()
    assert set(summary.architectures) <= {"x"} and summary.model_type in (None, "x")


# The constructor and tensors ---------------------------------------------------------------------

META_MASK = torch.zeros(E, dtype=torch.bool, device="meta")
BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_experts": 10**9}, ValueError, "num_experts is 1000000000, .* at most 65536"),
    ({"num_experts": 2**63}, ValueError, "num_experts is 9223372036854775808"),
    ({"hidden_size": 2**40}, ValueError, "hidden_size is 1099511627776, .* at most 1048576"),
    ({"moe_intermediate_size": 32 * 10**30}, ValueError, "moe_intermediate_size is 32000"),
    ({"num_experts": np.array([8])}, TypeError, "num_experts must be an integer, not array"),
    ({"num_experts": float("nan")}, TypeError, "num_experts must be an integer, not nan"),
    ({"num_experts": None}, TypeError, "num_experts must be an integer, not None"),
    ({"weight_path": 123}, TypeError, "weight_path must be a path or None, not int"),
    ({"weight_path": b"."}, TypeError, "weight_path must be a path or None, not bytes"),
    ({"weight_path": ""}, FileNotFoundError, "weight_path '' does not exist"),
    ({"weight_path": "a\0b"}, FileNotFoundError, "does not exist"),
    ({"weight_path": "~nobody-of-this-name/x"}, FileNotFoundError, "weight_path '~nobody"),
    ({"swiglu_limit": "7"}, TypeError, "swiglu_limit must be a number, not '7'"),
    ({"swiglu_limit": None}, TypeError, "swiglu_limit must be a number, not None"),
    ({"swiglu_alpha": 10**400}, TypeError, "swiglu_alpha must be a number, not 1000"),
    ({"numa_nodes": 0}, TypeError, "numa_nodes must be a list of integers, not 0"),
    ({"numa_nodes": [None]}, TypeError, "a NUMA node must be an integer, not None"),
    ({"numa_nodes": [-1]}, ValueError, "unknown NUMA node -1"),
    ({"isa": 5}, TypeError, "isa must be the name of a tier or None, not 5"),
    ({"method": None}, ValueError, "needs a weight_path"),
    ({"method": ["MXFP4"]}, ValueError, "unknown method"),
    ({"lora_rank": np.zeros(2)}, ValueError, "lora_rank=array.* is not supported"),
    ({"mode": torch.zeros(2)}, ValueError, "mode=tensor.* is not supported"),
    ({"gpu_experts_mask": META_MASK}, ValueError, "gpu_experts_mask must be an ordinary tensor"),
    ({"gpu_experts_mask": torch.zeros(E).bool().to_sparse()}, ValueError, "gpu_experts_mask must"),
    ({"gpu_experts_mask": np.zeros(E, bool)}, TypeError, "gpu_experts_mask must .* not ndarray"),
    ({"num_gpu_experts": 2.0}, TypeError, "num_gpu_experts must be an integer"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:32]
)
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapper(**arguments)


def test_integers_of_other_types_are_integers() -> None:
    w = wrapper(num_experts=np.int64(E), hidden_size=torch.tensor(H), cpuinfer_threads=np.int8(1))
    assert (w.num_experts, w.hidden_size) == (E, H) and type(w.num_experts) is int


def test_capture_batch_sizes_are_a_list() -> None:
    with pytest.raises(TypeError, match="capture_bs must be a list of integers, not 5"):
        KTMoEWrapper.set_capture_batch_sizes(5)  # type: ignore[arg-type]


BAD_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"gate_proj": None}, "gate_proj must be a tensor, not NoneType"),
    (
        {"up_proj": torch.zeros(E, I, H, device="meta")},
        "up_proj must be a dense tensor, not sparse or meta",
    ),
    ({"down_proj": torch.zeros(E, H, I).to_sparse()}, "down_proj must be a dense tensor"),
    ({"gate_proj": torch.zeros(E, I, H).to(torch.complex64)}, "gate_proj has dtype .*complex64"),
    ({"gate_bias": torch.zeros(E, I, dtype=torch.int64)}, "gate_bias has dtype torch.int64"),
    ({"down_bias": torch.zeros(E, H, dtype=torch.complex64)}, "down_bias has dtype .*complex64"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS, ids=lambda v: str(v)[:16])
def test_bad_tensors(tensors: dict[str, Any], message: str) -> None:
    good = {"gate_proj": WEIGHTS.gate, "up_proj": WEIGHTS.up, "down_proj": WEIGHTS.down}
    w = wrapper()
    with pytest.raises(TypeError, match=message):
        w.load_weights_from_tensors(**{**good, **tensors})
    assert not w.loaded


# Calls -------------------------------------------------------------------------------------------

IGNORED_IDS = [-1, -(2**31), 2**31 - 1, -(2**63), 2**63 - 1, 2**32 + 1, E]
"""Ids that are nobody's, also those that a careless cast would turn into an expert."""


@pytest.fixture(scope="module")
def loaded() -> KTMoEWrapper:
    return WEIGHTS.load(wrapper())


@pytest.mark.parametrize("nobody", IGNORED_IDS)
def test_ids_that_are_all_nobodys_give_zeros(loaded: KTMoEWrapper, nobody: int) -> None:
    batch, before = Batch.random(), loaded.ignored_ids
    kinds = [torch.int64] + ([torch.int32] if abs(nobody) <= 2**31 else [])
    for kind in kinds:
        y = loaded.forward(batch.hidden, torch.full((5, K), nobody, dtype=kind), batch.weights)
        assert y.shape == (5, H) and not y.any()
    assert loaded.ignored_ids - before == 5 * K * len(kinds)


def test_strict_makes_them_an_error() -> None:
    w, batch = WEIGHTS.load(wrapper(strict=True)), Batch.random()
    with pytest.raises(IndexError, match=r"15 of the ids in topk_ids are outside 0\.\.7"):
        w.forward(batch.hidden, torch.full_like(batch.ids, -1), batch.weights)
    assert torch.equal(w.forward(*batch.args), WEIGHTS.load(wrapper()).forward(*batch.args))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one row for all": lambda t: t[:1].expand(5, -1),
    "one column for all": lambda t: t[:, :1].expand(-1, t.shape[1]),
    "transposed": lambda t: t.t().contiguous().t(),
    "every other element": lambda t: torch.stack([t, t], dim=2)[:, :, 1],
    "backwards": lambda t: t.flip(0).flip(0),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(loaded: KTMoEWrapper, name: str) -> None:
    views = [VIEWS[name](t) for t in Batch.random().args]
    assert torch.equal(loaded.forward(*views), loaded.forward(*(v.clone() for v in views)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("where", ["hidden", "weights"])
def test_a_wild_value_stays_in_its_row(loaded: KTMoEWrapper, value: float, where: str) -> None:
    batch = Batch.random()
    clean = loaded.forward(*batch.args)
    getattr(batch, where)[2] = value
    y = loaded.forward(*batch.args)
    others = torch.arange(5) != 2
    assert torch.equal(y[others], clean[others])
    assert not torch.equal(y[2], clean[2])


def test_routing_weights_beyond_float32(loaded: KTMoEWrapper) -> None:
    batch = Batch.random()
    y = loaded.forward(batch.hidden, batch.ids, batch.weights.double() * 1e300)
    assert not y.isfinite().any()


NOT_DENSE: dict[str, Callable[[Batch], tuple[Any, ...]]] = {
    "hidden_states": lambda b: (b.hidden.to_sparse(), b.ids, b.weights),
    "topk_ids": lambda b: (b.hidden, b.ids.to_sparse(), b.weights),
    "topk_weights": lambda b: (b.hidden, b.ids, b.weights.to_sparse()),
}


@pytest.mark.parametrize("name", NOT_DENSE)
def test_sparse_tensors_are_refused(loaded: KTMoEWrapper, name: str) -> None:
    batch = Batch.random()
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor"):
        loaded.forward(*NOT_DENSE[name](batch))
    assert loaded.forward(*batch.args).isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (H,), (5, 0), (0, 0), (1, 5, H)])
def test_hidden_states_of_another_rank(loaded: KTMoEWrapper, shape: tuple[int, ...]) -> None:
    batch = Batch.random()
    with pytest.raises(ValueError, match="hidden_states has shape"):
        loaded.forward(torch.zeros(shape, dtype=torch.bfloat16), batch.ids, batch.weights)


def test_sync_with_something_else_can_be_repeated() -> None:
    w, batch = WEIGHTS.load(wrapper()), Batch.random()
    w.submit_forward(*batch.args)
    with pytest.raises(TypeError, match="hidden_states must be a tensor, not NoneType"):
        w.sync_forward(None)  # type: ignore[arg-type]
    assert w.sync_forward(batch.hidden).isfinite().all()


def test_any_bytes_in_the_mask_count_as_true() -> None:
    w, batch = WEIGHTS.load(wrapper()), Batch.random()
    for byte in (2, 255):
        w.gpu_experts_mask.view(torch.uint8).fill_(byte)
        assert not w.forward(*batch.args).any()


def test_wrappers_used_and_closed_by_many_threads() -> None:
    """Each thread has its own; all share the pool. Closing one does not disturb the others."""
    batch, wrong = Batch.random(), []
    expected = WEIGHTS.load(wrapper()).forward(*batch.args)

    def work() -> None:
        for _ in range(5):
            w = WEIGHTS.load(wrapper())
            wrong.extend(1 for _ in range(10) if not torch.equal(w.forward(*batch.args), expected))
            w.submit_forward(*batch.args)
            w.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
