"""Answers of a model: one after the other with its cache kept, and a server of them."""
