"""Claims of the papers on language-model agents."""
