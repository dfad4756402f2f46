"""Full-size checkpoints with random weights: published dimensions and layouts, nothing to download."""
