"""CPU expert kernels: vector DSL, ISA tiers, panels, worker pools, the fused expert FFN."""
