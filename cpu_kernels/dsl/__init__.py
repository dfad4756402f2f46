"""A small vector language: kernels are written once, tiers say how each op is lowered."""
