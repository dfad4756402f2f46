"""What changes in a layer's tables when an expert has been copied to or from them."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, load_acquire, store_release
from hybrid_moe.cpu_kernels.drivers.records import Move


@driver
def apply_move(move: Move) -> None:
    """Write an expert's entries in the table, and its byte in the mask. No launch of the layer runs
    meanwhile: the caller, or the stream whose host function this is, has them before or behind."""
    for i in range(move.pools):
        pool = move.pools - 1 - i
        share = move.shares[pool]
        new = move.entries[pool]
        share.down = new.down
        share.gate_bias = new.gate_bias
        share.up_bias = new.up_bias
        share.down_bias = new.down_bias
        # pool 0 is the last: as `publish.publish_word`, with the acquire of `expert_state`
        store_release(share.gate_up, load_acquire(new.gate_up))
    move.mask[0] = move.state
    store_release(move.applied, 1)  # nothing here is touched any more: pairs with Python's `idle`
