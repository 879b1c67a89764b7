"""Claims of the papers on pruning, quantization, factorisation."""
