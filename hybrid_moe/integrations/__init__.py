"""Places where hybrid_moe plugs into other programs.

Transformers, in the order of a call: `transformers` (public functions), `loading` (a model whose
experts never pass through torch), `experts_module` (what an experts module computes and holds),
`proof` (of its activation and layout), `hybrid_experts` (the module in its place), `dispatch`
(`experts_implementation="hybrid_moe"`), `import_hook` (how the name gets registered), `guard` (what
it refuses), `options` (method and threads). `late` acts on a module of theirs when it is imported.
"""
