"""CPU expert kernels: vector DSL, ISA tiers, strips, worker pools, the fused expert FFN."""
