"""Kernels of the GPU half: compiled for each architecture, executed by the PTX simulator."""
