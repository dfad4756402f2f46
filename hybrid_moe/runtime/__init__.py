"""One layer at work: its arguments, its weights, and what runs it.

`arguments` checks what callers pass, `weights`, `filling` and `checkpoint_cache` bring weights in,
`export` brings them out, `runner` runs a step, `deferral` and `construction_order` carry experts
over to the next layer, `torch_op` and `untraced` are for `torch.compile`.
"""
