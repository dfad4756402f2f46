"""Random wrappers under random use, beside a model of what they must do."""
