"""The experts on a GPU: kernels in CuTe DSL over the CPU's own strips, and their references."""
