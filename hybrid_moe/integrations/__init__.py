"""Where hybrid_moe plugs into other programs: `transformers` and `sglang`, each the whole of its
engine."""
