"""What a model needs on a machine, and how fast it will run there, before anything is loaded.

machine      what there is: GPUs, memory, the measured ceilings of the processor
model        what the headers and `config.json` say: bytes of each part, experts of each layer
kv_cache     bytes of the KV cache, by the kind of attention
scratch      what a pass over a batch borrows, in RAM and on the GPU
parts        what takes memory, and where; which experts are on the GPU
hot_choice   which experts are on the GPU
budget_curve   hit rate and speed by GPU memory, where the routing was measured
plan         what was asked, and the answer
fitting      whether it fits, and what would make it fit
linear_layers  layers beside the experts that are held in strips, and their bytes
reading      bytes that a token reads on a machine without a GPU
terms        what a predicted time consists of
step_work    a model's steps as the timeline takes them
prediction   tokens per second beside a GPU, and what limits them
cpu_only     tokens per second without one
decode_depth   how many experts of a token a server defers
batch_step   how long steps of several tokens take
admission    how many requests run at a time
draft_steps  how often drafts must be right to pay, and how long they should be
serving      the SGLang command that carries the plan out
"""

from hybrid_moe.planning.fitting import make_plan
from hybrid_moe.planning.machine import CpuSpeeds, Gpu, parse_gpus
from hybrid_moe.planning.model import HotExperts, Model, read_model
from hybrid_moe.planning.parts import slots_of
from hybrid_moe.planning.plan import DoesNotFitError, MeasuredRouting, MemoryPart, Plan, Request
from hybrid_moe.planning.terms import Prediction, Term
from hybrid_moe.text import parse_size

__all__ = [
    "CpuSpeeds",
    "DoesNotFitError",
    "Gpu",
    "HotExperts",
    "MeasuredRouting",
    "MemoryPart",
    "Model",
    "Plan",
    "Prediction",
    "Request",
    "Term",
    "make_plan",
    "parse_gpus",
    "parse_size",
    "read_model",
    "slots_of",
]
