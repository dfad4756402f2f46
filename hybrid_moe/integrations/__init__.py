"""Places where hybrid_moe plugs into other programs."""
