"""How packed experts are written: their keys, and where in each tensor an expert lies.

Transformers' conversion runs on small stand-ins for the parameters of the experts modules. Every
element is another number, so a result tells of which matrix of which expert it is, and whether it
is transposed. MXFP4 experts, which Transformers has no module for, take the names that their
family publishes beside those BF16 keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import F32, Array, f32_to_bf16
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.loaders.naming import FUSED, GPT_OSS_MXFP4, PER_EXPERT, find_layers
from hybrid_moe.loaders.writer import PlannedTensor

_H, _I = 3, 2  # of stand-ins: different, so that shapes tell a matrix from its transpose
_EXACT = 1 << 52
"""Integers below this are exact in the float64 of stand-ins."""


@dataclass(frozen=True)
class Saved:
    """A tensor that holds a matrix or a bias of one expert, or of all in turn.

    Attributes:
        planned: its key, dtype and shape.
        projection: "gate", "up", "down" or "gate_up".
        part: "weight" (codes), "scales" or "bias".
        expert: None for all.
        transposed: [inputs, outputs].
        interleaved: of "gate_up", rows in turn rather than one behind the other.
    """

    planned: PlannedTensor
    projection: str
    part: str
    expert: int | None
    transposed: bool = False
    interleaved: bool = False

    def data(self, tensors: ExpertTensors) -> Array:
        """The values of one expert."""
        if self.projection == "gate_up":
            parts = [self._of(tensors.gate), self._of(tensors.up)]
            values = np.concatenate(parts) if not self.interleaved else _in_turn(*parts)
        else:
            values = self._of(getattr(tensors, self.projection))
        if self.part == "bias":
            return _as(values, self.planned.dtype)
        return values.T if self.transposed else values

    def _of(self, matrix: Matrix) -> Array:
        if self.part == "bias":
            assert matrix.bias is not None
            return matrix.bias
        if self.part == "scales":
            assert matrix.scales is not None
            return matrix.scales
        return matrix.codes


def _in_turn(one: Array, other: Array) -> Array:
    return np.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def _as(values: F32, dtype: str) -> Array:
    """Biases in the dtype of a file."""
    if dtype == "BF16":
        return f32_to_bf16(values)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def stand_ins(modules: Mapping[str, HybridExperts]) -> dict[str, torch.Tensor]:
    """Small float64 tensors for the parameters that the modules had, by their names."""
    found: dict[str, torch.Tensor] = {}
    begin = 0
    for name, module in modules.items():
        for parameter, shape in _shapes(module.spec).items():
            size = int(np.prod(shape))
            values = np.arange(begin, begin + size, dtype=np.float64).reshape(shape)
            found[f"{name}.{parameter}"] = torch.from_numpy(values)
            begin += size
    assert begin < _EXACT
    return found


def _shapes(spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
    E = spec.num_experts
    gate_up, down = (2 * _I, _H), (_H, _I)
    if spec.transposed:
        gate_up, down = gate_up[::-1], down[::-1]
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (E, *gate_up), "down_proj": (E, *down)}
    if spec.biased:
        shapes |= {"gate_up_proj_bias": (E, 2 * _I), "down_proj_bias": (E, _H)}
    return shapes


class SavedExperts:
    """The tensors in which one experts module is written."""

    def __init__(
        self,
        name: str,
        module: HybridExperts,
        given: Mapping[str, torch.Tensor],
        converted: Mapping[str, torch.Tensor],
        dtype: str,
    ) -> None:
        """Find them.

        Args:
            name, module: the experts.
            given: `stand_ins` of all modules.
            converted: what Transformers made of them; those of other modules are passed over.
            dtype: of biases, as safetensors names it.

        Raises:
            NotImplementedError: a result that is neither an expert's matrix nor all of them;
                experts in a format that no checkpoint stores.
        """
        self.module, self._spec, self._dtype = module, module.spec, dtype
        formats = module.formats
        assert formats is not None
        self._fmt = formats.gate_up
        if formats.each not in ((MXFP4,), (BF16,)):
            raise NotImplementedError(
                f"{module.spec.where}: experts in {formats.name} are not written, only MXFP4 and "
                "BF16 ones are"
            )
        self.tensors = self._found(name, given, converted)
        if self._fmt is MXFP4:
            self.tensors = self._in_mxfp4([t for t in self.tensors if t.part == "weight"])

    @property
    def interleaved_mxfp4(self) -> bool:
        """Whether this is what gpt-oss publishes, which Transformers loads."""
        return any(t.planned.key.endswith("_blocks") for t in self.tensors)

    def writes(self) -> Iterator[tuple[str, Array, int]]:
        """Key, values, and the byte of the tensor at which they begin."""
        whole = [t for t in self.tensors if t.expert is None]
        single: dict[int, list[Saved]] = {}
        for tensor in self.tensors:
            if tensor.expert is not None:
                single.setdefault(tensor.expert, []).append(tensor)
        for expert in range(self._spec.num_experts):
            values = self.module.unpack(expert)
            for tensor in (*single.get(expert, ()), *whole):
                data = tensor.data(values)
                at = expert * data.nbytes if tensor.expert is None else 0
                yield tensor.planned.key, data, at

    def _found(
        self, name: str, given: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor]
    ) -> list[Saved]:
        known = self._known(name, given)
        numbers = [t for n, t in given.items() if n.rpartition(".")[0] == name]
        low, high = (float(f(t)) for f, t in ((torch.min, numbers[0]), (torch.max, numbers[-1])))
        found = []
        for key, result in converted.items():
            first = float(result.flatten()[0])
            if not low <= first <= high:
                continue
            what = known.get(_bits(result.numpy()))
            if what is None:
                raise NotImplementedError(
                    f"{self._spec.where}: Transformers writes {key} in a way that is not known here"
                )
            projection, part, expert, transposed = what
            rows = {"gate": self._spec.intermediate, "up": self._spec.intermediate}
            N = rows.get(projection, self._spec.hidden)
            N = 2 * self._spec.intermediate if projection == "gate_up" else N
            K = self._spec.intermediate if projection == "down" else self._spec.hidden
            shape: tuple[int, ...] = (N,) if part == "bias" else (K, N) if transposed else (N, K)
            if expert is None:
                shape = (self._spec.num_experts, *shape)
            dtype = self._dtype if part == "bias" else "BF16"
            planned = PlannedTensor(key, dtype, shape)
            interleaved = projection == "gate_up" and not self._spec.concatenated
            found.append(Saved(planned, projection, part, expert, transposed, interleaved))
        return found

    def _known(self, name: str, given: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
        """What each possible result is: (projection, part, expert, transposed)."""
        known: dict[Any, tuple[str, str, int | None, bool]] = {}
        for part, suffix in (("weight", ""), ("bias", "_bias")):
            if f"{name}.down_proj{suffix}" not in given:
                continue
            gate_up, down = (given[f"{name}.{p}_proj{suffix}"].numpy() for p in ("gate_up", "down"))
            if part == "weight" and self._spec.transposed:
                gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
            if self._spec.concatenated:
                gate, up = gate_up[:, :_I], gate_up[:, _I:]
            else:
                gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
            matrices = {"gate": gate, "up": up, "down": down, "gate_up": gate_up}
            for projection, values in matrices.items():
                known[_bits(values)] = (projection, part, None, False)
                for expert, matrix in enumerate(values):
                    known[_bits(matrix)] = (projection, part, expert, False)
                    if part == "weight":
                        known[_bits(matrix.T)] = (projection, part, expert, True)
                if part == "weight":
                    known[_bits(values.swapaxes(1, 2))] = (projection, part, None, True)
        return known

    def _in_mxfp4(self, weights: list[Saved]) -> list[Saved]:
        """The tensors of codes, scales and biases that the family's MXFP4 checkpoints have."""
        try:
            layers = find_layers(tensor.planned.key for tensor in weights)
        except CheckpointError:
            layers = {}
        if len(layers) != 1:
            raise NotImplementedError(
                f"{self._spec.where}: MXFP4 experts have no names beside {weights[0].planned.key}"
            )
        (keys,) = layers.values()
        scheme, spec = keys.scheme, self._spec
        if scheme is FUSED:  # its name does not tell where gate and up lie
            scheme = PER_EXPERT if spec.concatenated else GPT_OSS_MXFP4
        H, I = spec.hidden, spec.intermediate
        sizes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        if scheme.fused:
            sizes = {"gate_up": (2 * I, H), "down": (H, I)}
        names = {"gate": scheme.gate, "up": scheme.up, "down": scheme.down, "gate_up": scheme.gate}
        tensors = []
        for expert in [None] if scheme.fused else range(spec.num_experts):
            for projection, (N, K) in sizes.items():
                stem = scheme.stem(keys.prefix, keys.layer, expert or 0) + names[projection]
                shapes: dict[str, tuple[int, ...]] = {
                    "weight": self._fmt.code_shape(N, K), "scales": (N, K // 32), "bias": (N,),
                }  # fmt: skip
                if expert is None:  # gpt-oss: [E, N, K/32, 16] and [E, N, K/32]
                    shapes = {k: (spec.num_experts, *shape) for k, shape in shapes.items()}
                    shapes["weight"] = (*shapes["scales"], 16)
                dtypes = {"bias": "F32" if expert is not None else self._dtype}
                dtypes["weight"], dtypes["scales"] = scheme.mxfp4_dtypes
                ends = {"weight": scheme.weights[0], "scales": scheme.scales[0]}
                if spec.biased:
                    ends["bias"] = scheme.bias
                for part, end in ends.items():
                    planned = PlannedTensor(stem + end, dtypes[part], shapes[part])
                    tensors.append(Saved(planned, projection, part, expert, False, scheme.fused))
        return tensors


def _bits(values: Array) -> tuple[tuple[int, ...], bytes]:
    return values.shape, np.ascontiguousarray(values).tobytes()


def planned(experts: Iterable[SavedExperts]) -> list[PlannedTensor]:
    """All their tensors."""
    return [tensor.planned for saved in experts for tensor in saved.tensors]
