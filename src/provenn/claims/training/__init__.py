"""Claims of the papers on ways to train."""
