"""One layer at work: its arguments, its weights, and what runs it.

`arguments` checks what a wrapper is made of, `call` the tensors of a call. `weights`, `filling` and
`checkpoint_cache` bring weights in, `export` brings them out. `runner` runs a step, `submission` is
what it has under way, `host_mask` which experts it skips. `deferral` and `construction_order` carry
experts over to the next layer. `torch_op` and `untraced` are for `torch.compile`. `layer_facts` and
`process_wide` are the parts of `KTMoEWrapper` that only tell, and that need no layer.
"""
