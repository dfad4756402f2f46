"""Places where hybrid_moe plugs into other programs: `transformers` and `sglang`, each the whole of
its engine. `late` acts on a module of theirs when it is imported.
"""
