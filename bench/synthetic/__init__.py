"""Full-size checkpoints with random weights, in published dimensions and layouts."""
