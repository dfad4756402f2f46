"""Experts that change places between the halves of a layer: a part of `KTMoEWrapper`."""

from __future__ import annotations

from hybrid_moe.runtime import arguments, torch_op
from hybrid_moe.runtime.export import ExpertWriter
from hybrid_moe.runtime.layer_facts import LayerFacts


class ExpertMoves(LayerFacts):
    """Slots and moves of a wrapper, which provides the attributes."""

    _writer: ExpertWriter

    def reserve_slots(self, biases: bool | None = None) -> None:
        """Allocate the device's memory for the slots now, so that whoever shares out the rest sees
        what is left; loading does it otherwise. Does nothing without a `gpu_backend`.

        Args:
            biases: with room for biases. None: if the checkpoint has any; with `weight_path` None,
                yes.

        Raises:
            RuntimeError: the device has no room; the wrapper is closed.
        """
        self._check_open()
        if self._hot is None:
            return
        if biases is None and self.weight_path is not None:
            biases = self.checkpoint_source().has_bias
        self._hot.reserve(self._layer.shares(biases=biases is not False))
        if self._prefill_stream is not None:
            self._prefill_stream.reserve(self._hot)

    def promote(self, expert: int, cuda_stream: int | None = None) -> None:
        """Move an expert from the CPU to a free slot of the GPU, with its bit in the mask.

        What was submitted before works on the placement as it was, what is submitted afterwards,
        and every replay of a graph, on the new one. The bytes are copied once and nothing else is
        done to them.

        A move on another stream than the layer's latest call waits for that call, and the next
        call for the move. Streams that replay graphs, or more streams than these two, are the
        caller's to order. Where submit and sync of a step are in two graphs, or experts are
        deferred from one to the next, a move belongs between steps.

        Args:
            expert: id, of an expert on the CPU.
            cuda_stream: the stream of this layer's calls, as for `submit_forward`.

        Raises:
            IndexError, ValueError: there is no such expert, or not on the CPU.
            RuntimeError: no slot is free; a graph is being captured; no `gpu_backend`; not loaded.
        """
        self._move(expert, True, cuda_stream)

    def demote(self, expert: int, cuda_stream: int | None = None) -> None:
        """Move an expert from the GPU to the CPU, which has room for one more than were loaded
        there; with `gpu_panels="keep"` it has all of them, and nothing is copied. See `promote`.

        Raises:
            IndexError, ValueError: there is no such expert, or not on the GPU.
            RuntimeError: the CPU has no place left; and as for `promote`.
        """
        self._move(expert, False, cuda_stream)

    def _move(self, expert: int, hot: bool, cuda_stream: int | None) -> None:
        runner = self._runner or self._loaded_runner()
        index = arguments.integer("expert", expert)
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert is {index}, must be in 0..{self.num_experts - 1}")
        self._writer.wait()  # it may be reading the expert's place
        torch_op.untraced(runner.move)(index, hot, cuda_stream)
