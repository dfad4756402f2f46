"""Which code a GPU runs.

Code for one architecture also runs on later ones of the same generation (NVIDIA's "binary
compatibility": from x.y to x.z, z >= y), but not on the next generation. Plain names are enough:
the kernels need neither `sm_90a` nor `sm_100a`, whose code runs on exactly one architecture.
CuTe DSL 4.8.1 takes all of these as they are, with the CUDA 12.9 tools of its cu12 wheel as well.
"""

from __future__ import annotations

from hybrid_moe.gpu_kernels.definition import ARCHITECTURES

_CAPABILITIES = {name: divmod(int(name.removeprefix("sm_")), 10) for name in ARCHITECTURES}
"""Name -> compute capability (major, minor)."""


def architecture_of(capability: tuple[int, int]) -> str | None:
    """The architecture whose code a GPU of this compute capability runs: the latest of its
    generation that is not newer than the GPU. None if there is none."""
    fitting = [
        (its_own, name)
        for name, its_own in _CAPABILITIES.items()
        if its_own[0] == capability[0] and its_own <= capability
    ]
    return max(fitting)[1] if fitting else None
