"""From the bytes of a strip to operands of tensor cores, for each weight format.

    codes         words of codes -> pairs of bf16, the A operand          (`pairs`: the bits)
    scalings      factors of groups: folded into A, or for float32 products (`superblocks`: ggml's)
    row_factors   factors of rows, for the sum over K
    strip_codes   these together: loads, fragments and factors of a lane
    table         which format has which

A scale is folded into the codes only where the product is exact in bf16; a weight is never rounded.
E2M1 times E8M0 has 2 significant bits, E4M3 times E8M0 4, E2M1 times E4M3 6, of bf16's 8. E8M0
reaches further than bf16: an expert with a scale beyond `FOLDED_SCALES` is *wide*, and the scales
of all its groups multiply float32 products instead, which is exact for 0 to 254.

The DSL traces these methods in a kernel. They contain no loops or conditions of the GPU's: what is
written with `for` here is unrolled.
"""
