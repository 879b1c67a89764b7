"""Claims of the papers on architecture and black-box search."""
