"""GGUF files: a parser that trusts nothing, blocks into planes, and experts by layer."""
