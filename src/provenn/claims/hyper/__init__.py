"""Claims of the papers on networks that make networks."""
