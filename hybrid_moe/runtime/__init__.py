"""One layer at work: its arguments, its weights, and what runs it.

`arguments` and `gpu_arguments` check what a wrapper is made of, `call` the tensors of a call.
`weights`, `filling` and `checkpoint_cache` bring weights in, `export` brings them out. `runner`
runs a step, `submission` is what it has under way, `host_mask` which experts it skips. `hot_half`
is what a GPU computes of it, `placement_moves` which experts are there, `gpu_faults` its errors.
`deferral` and `construction_order` carry experts over to the next layer. `torch_op` and `untraced`
are for `torch.compile`. `layer_facts`, `expert_moves`, `expert_export` and `process_wide` are parts
of `KTMoEWrapper`: what only tells, moves, writes experts out, and needs no layer.
"""
