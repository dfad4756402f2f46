"""Linear layers of a model in strips.

The modules: `hybrid_linear`, `weight` (its weight, unpacked when read), `held` (the packed matrix
behind both), `packed_module` (what such modules refuse), `shared_input` (q, k and v as one job),
`embedding` (rows of a tied output layer), `mlp` (gated MLPs as one job), `grouped` (block-diagonal
layers). A model's: `choose` (which layers are taken), `packing` (what fills them), `stored_linear`
and `dense_loading` (from checkpoints and loaded models), `saving` and `saved_experts` (back).
"""
