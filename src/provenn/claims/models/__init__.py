"""Claims of the papers on whole architectures."""
