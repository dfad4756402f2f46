"""Reading checkpoints into `ExpertTensors`: naming schemes, safetensors, conversion, inspection."""

from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.convert import convert_checkpoint
from hybrid_moe.loaders.expert_source import ExpertSource, held_formats
from hybrid_moe.loaders.inspect import CheckpointSummary, inspect_checkpoint
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.load import check_map, load_layer
from hybrid_moe.loaders.safetensors import SafetensorsIndex

__all__ = [
    "Checkpoint",
    "CheckpointSummary",
    "ExpertSource",
    "LayerSource",
    "SafetensorsIndex",
    "check_map",
    "convert_checkpoint",
    "held_formats",
    "inspect_checkpoint",
    "load_layer",
]
