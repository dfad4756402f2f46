"""Matrices into strips and back (`hybrid_moe.formats.strips` has their layout)."""
