"""Claims of the papers on diffusion, GANs, samplers."""
