"""A slot's layout as text, which an operator of torch can have as an argument.

    "MXFP4/MXFP4 2880x2880 biases 0:45/0:23 45:90/23:45"    formats of gate/up and down; of each
                                                            pool gate/up strips / down strips

A captured graph that is saved holds all that it needs: no handle that another process lacks.
"""

from __future__ import annotations

import functools
import re

from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.strips import strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

_TEXT = re.compile(r"(\w+)/(\w+) (\d+)x(\d+)( biases)?((?: \d+:\d+/\d+:\d+)+)")


@functools.lru_cache(maxsize=1024)
def layout_to_text(layout: SlotLayout) -> str:
    """`layout` as text."""
    shares = [
        f"{share.blocks.start}:{share.blocks.stop}/{share.strips.start}:{share.strips.stop}"
        for share in layout.shares
    ]
    biases = ["biases"] if layout.biases else []
    size = f"{layout.hidden}x{layout.intermediate}"
    names = "/".join(fmt.name for fmt in layout.formats)
    return " ".join([names, size, *biases, *shares])


@functools.lru_cache(maxsize=1024)
def layout_from_text(text: str) -> SlotLayout:
    """What `layout_to_text` has written.

    Raises:
        ValueError: it has not, or the numbers are no layout's.
    """
    match = _TEXT.fullmatch(text)
    if match is None or match[1] not in FORMATS or match[2] not in FORMATS:
        raise ValueError(f"layout is {text!r}, must be what layout_to_text writes")
    formats = LayerFormats(FORMATS[match[1]], FORMATS[match[2]])
    hidden, intermediate = int(match[3]), int(match[4])
    shares = []
    for share in match[6].split():
        blocks, strips = (range(*map(int, part.split(":"))) for part in share.split("/"))
        shares.append(
            ShareLayout(
                blocks,
                strips,
                strip_layout(formats.gate_up, hidden),
                strip_layout(formats.down, intermediate),
                biases=match[5] is not None,
            )
        )
    return SlotLayout(formats, hidden, intermediate, tuple(shares))
