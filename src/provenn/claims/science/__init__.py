"""Claims of the papers on operators, PDEs, inverse problems."""
