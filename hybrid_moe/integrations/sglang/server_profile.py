"""`HYBRID_MOE_PROFILE=FILE`: a running server measures its routing (`placement.routing_profile`).

    ModelRunner.forward ──► phase, a word on the device, in the order of the stream
    KTEPWrapperMethod   ──► counts on the device, some operations a layer; a graph's replays count
    a thread            ──► every 20 seconds the file, if there was a step since the last one

What graphs count while they are captured and warmed up is forgotten with the first step of a
request. Of several tensor parallel ranks, which all see the same routing, the first one records.
Layers of a draft model are not recorded.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError
from hybrid_moe.integrations.sglang.step_faults import before
from hybrid_moe.logs import warn_once
from hybrid_moe.placement.routing_profile import RoutedModel
from hybrid_moe.placement.routing_profile_file import write_routing_profile
from hybrid_moe.placement.routing_recorder import RoutingRecorder

logger = logging.getLogger(__name__)

VARIABLE = "HYBRID_MOE_PROFILE"
"""Environment variable: the file that is written."""

SECONDS = 20.0
"""Between two writes of the file, which take some 0.1 s of this process for a large model."""

PHASE_OF_MODE = {"EXTEND": "prefill", "DECODE": "decode", "TARGET_VERIFY": "decode"}
"""SGLang's `ForwardMode` -> phase. A batch of any other mode mixes them."""


class ServerProfile:
    """The routing of one scheduler process.

    Args:
        path: the file.

    Raises:
        ValueError: it could not be written; an error now, not after a day.
    """

    def __init__(self, path: Path) -> None:
        folder = path.absolute().parent
        if path.suffix != ".json" or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(
                f"{VARIABLE}={path} must be a .json file in a folder that can be written"
            )
        self.path = path
        self._sizes: dict[int, tuple[int, int, int]] = {}  # H, E and k by layer
        self._devices: dict[int, torch.device] = {}
        self._model_type = ""
        self._recorder: RoutingRecorder | None = None
        self._steps = 0
        self._written = (0, 0)  # steps that had begun before the last two writes
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def join(self, layer: Any, num_experts: int, device: torch.device, weights: Any) -> None:
        """A layer that will be recorded; every layer joins before one runs.

        Args:
            layer: the `FusedMoE`. num_experts: its routed experts E.
            device: of its ids. weights: path of its checkpoint.

        Raises:
            UnsupportedLayerError: it does not say how many experts a token takes.
        """
        if layer.top_k is None:
            raise UnsupportedLayerError(
                f"{VARIABLE}: layer {layer.layer_id} does not say how many experts a token has"
            )
        hidden = getattr(layer, "hidden_size_unpadded", layer.hidden_size)
        self._sizes[layer.layer_id] = hidden, num_experts, layer.top_k
        self._devices[layer.layer_id] = device
        self._model_type = self._model_type or _model_type(weights)

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Count what a layer's router chose: integers [T, k]."""
        if self._recorder is None:
            if ids.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{VARIABLE}: the first batch is a graph's capture, in which no memory can be "
                    "allocated: start the server without graphs, or without the variable"
                )
            self._recorder = self._new_recorder()
        self._recorder.add(layer, ids)

    def _new_recorder(self) -> RoutingRecorder:
        hidden, experts, top_k = map(max, zip(*self._sizes.values(), strict=True))
        layers = tuple(sorted(self._sizes))
        recorder = RoutingRecorder(RoutedModel(self._model_type, hidden, experts, top_k, layers))
        recorder.prepare(self._devices)
        return recorder

    def before_forward(self, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Before `ModelRunner.forward`, which runs on the stream of the step. Captures do not go
        through it."""
        if not self._sizes:
            return
        self._steps += 1
        if self._recorder is None:
            self._recorder = self._new_recorder()
        if self._writer is None:
            self._recorder.reset()
            self._writer = threading.Thread(target=self._write_often, daemon=True, name=VARIABLE)
            self._writer.start()
            atexit.register(self.write)
            logger.info("%s: routing is recorded into %s", VARIABLE, self.path)
        phase = PHASE_OF_MODE.get(forward_batch.forward_mode.name, "unknown")
        self._recorder.set_phase(phase)

    def _write_often(self) -> None:
        pause = threading.Event()
        while not pause.wait(SECONDS):
            self.write()

    def write(self) -> None:
        """Write the file, if there was a step since the last time; once more after that, for the
        latest step may have been under way."""
        with self._lock:
            steps, recorder = self._steps, self._recorder
            if recorder is None or not steps or self._written == (steps, steps):
                return
            try:
                write_routing_profile(self.path, recorder.profile("requests of a server"))
            except OSError as error:
                warn_once(f"{VARIABLE}: {self.path} cannot be written: {error}")
            self._written = self._written[1], steps


def _model_type(weights: Any) -> str:
    """What `config.json` beside the weights calls the model, for people; empty for nothing."""
    try:
        config = json.loads((Path(weights) / "config.json").read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):  # no folder; what is wrong with it, loading tells
        return ""
    return str(config.get("model_type", "")) if isinstance(config, Mapping) else ""


def install(profile: ServerProfile) -> None:
    """Let SGLang's model runners tell about their steps."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    before(ModelRunner, "forward", profile.before_forward)


_profile: ServerProfile | None = None


def chosen(environ: Mapping[str, str] = os.environ) -> ServerProfile | None:
    """The profile of this process; None where none is wanted.

    Raises:
        ValueError: the variable's value.
    """
    global _profile
    wanted = environ.get(VARIABLE)
    if not wanted:
        return None
    path = Path(wanted).expanduser()
    if _profile is None or _profile.path != path:
        _profile = ServerProfile(path)
    return _profile
