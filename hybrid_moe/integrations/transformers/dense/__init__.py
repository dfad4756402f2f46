"""Linear layers of a model in strips: `hybrid_linear` (the module), `weight` (its weight, unpacked
when read), `held` (the packed matrix behind both), `packed_module` (what such modules refuse),
`shared_input` (q, k and v as one job), `embedding` (rows of a tied output layer).
"""
