"""Claims of the papers on optimizers and step-size rules."""
