"""Kernels of the expert FFN, written once in the vector language."""
