"""What a model needs on a machine, and how fast it will run there, before anything is loaded.

machine      what there is: GPUs, memory, the measured ceilings of the processor
model        what the headers and `config.json` say: bytes of each part, experts of each layer
kv_cache     bytes of the KV cache, by the kind of attention
scratch      what a pass over a batch borrows, in RAM and on the GPU
gpu_share    which experts fit on the GPU
plan         all of it put together: parts, places, and what does not fit
prediction   tokens per second, and what limits them
serving      the SGLang command that carries the plan out
"""

from hybrid_moe.planning.fitting import make_plan
from hybrid_moe.planning.gpu_share import Placement
from hybrid_moe.planning.machine import CpuSpeeds, Gpu, parse_gpus, parse_size
from hybrid_moe.planning.model import Model, read_model
from hybrid_moe.planning.plan import DoesNotFitError, Part, Plan, Request
from hybrid_moe.planning.prediction import Prediction, Term

__all__ = [
    "CpuSpeeds",
    "DoesNotFitError",
    "Gpu",
    "Model",
    "Part",
    "Placement",
    "Plan",
    "Prediction",
    "Request",
    "Term",
    "make_plan",
    "parse_gpus",
    "parse_size",
    "read_model",
]
