"""Claims of the papers on loss functions."""
