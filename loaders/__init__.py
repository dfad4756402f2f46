"""Readers that turn checkpoints into `ExpertTensors`."""
