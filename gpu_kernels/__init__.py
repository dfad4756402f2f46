"""GPU kernels: CuTe DSL kernels for hot experts, their packing and torch references."""
