"""Claims of the papers on survival, priors, predictive inference."""
