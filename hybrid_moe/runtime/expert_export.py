"""Experts on their way out, for the prefill of whole layers on GPUs: a part of `KTMoEWrapper`."""

from __future__ import annotations

from hybrid_moe.runtime.export import ExpertWriter
from hybrid_moe.runtime.layer_facts import LayerFacts


class ExpertExport(LayerFacts):
    """What writes a wrapper's experts into buffers of the caller's; see `runtime.export`."""

    _writer: ExpertWriter

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: list[int],
        w13_scale_ptrs: list[int],
        w2_weight_ptrs: list[int],
        w2_scale_ptrs: list[int],
    ) -> None:
        """Start writing one expert into host buffers, cut for tensor parallel ranks.

        Args:
            gpu_tp_count: n ranks; I / n must be a multiple of the format's group.
            expert_id: an id of `topk_ids` whose expert is loaded here.
            w13_weight_ptrs: for each rank the address of [2 I/n, H] weights as the checkpoint
                codes them (MXFP4: H/2 bytes a row): its rows of gate, then those of up.
            w13_scale_ptrs: of [2 I/n, H/group], bfloat16 where they are E8M0, else of the format's
                own type (FP8: [2 I/n/128, H/128] float32); zeros where it has no scales.
            w2_weight_ptrs, w2_scale_ptrs: of [H, I/n] and [H, I/n/group], likewise.

        The buffers are complete after `sync_write_weight_scale_to_buffer`. Nobody can check what
        lies at an address: too small a buffer is written beyond its end.

        Raises:
            RuntimeError: not loaded. IndexError: this expert is not (the mask put it on the GPU).
            TypeError, ValueError: the number of ranks, or of pointers, or a null pointer.
            NotImplementedError: a format that has more than codes and scales.
        """
        self._loaded_runner().wait_for_moves()
        self._writer.submit(
            gpu_tp_count,
            expert_id,
            {
                "w13_weight_ptrs": w13_weight_ptrs,
                "w13_scale_ptrs": w13_scale_ptrs,
                "w2_weight_ptrs": w2_weight_ptrs,
                "w2_scale_ptrs": w2_scale_ptrs,
            },
        )

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until every expert submitted for writing is written.

        Raises:
            RuntimeError: not loaded; a write failed.
        """
        self._loaded_runner()
        self._writer.sync()
