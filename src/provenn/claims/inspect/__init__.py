"""Claims of the papers on probes of trained networks."""
