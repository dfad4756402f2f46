"""Transformers, in the order of a call: `registration` (public functions), `loading` (a model whose
experts never pass through torch), `experts_module` (what an experts module computes and holds),
`proof` (of its activation and layout), `hybrid_experts` (the module in its place), `model_split`,
`split_experts` (where a GPU has some of them), `hit_rates` (how many calls those get),
`gated_drafts` (assisted generation as it pays), `step_ratio` (how much longer steps of several
tokens are), `draft_model` (what drafts),
`dispatch` (`experts_implementation="hybrid_moe"`), `guard` (what it refuses), `options` (method,
threads, back end).
"""
