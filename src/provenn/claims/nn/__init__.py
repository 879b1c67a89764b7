"""Claims of the papers on layers and attention."""
