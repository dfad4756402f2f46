"""Kernels of the experts on a GPU: none yet."""
