"""Claims of the papers on control and combinatorial optimisation."""
