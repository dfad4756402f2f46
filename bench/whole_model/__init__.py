"""Engines of `bench/end_to_end.py`: a whole model in a process of its own, one interface."""
