"""Measured limits: how fast memory is read, how fast a tier multiplies."""
