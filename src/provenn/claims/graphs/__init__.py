"""Claims of the papers on graph networks."""
