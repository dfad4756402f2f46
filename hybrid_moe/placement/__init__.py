"""Which expert lives where."""
