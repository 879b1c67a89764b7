"""Linear algebra and kernels that several methods share."""
