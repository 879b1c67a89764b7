"""What generative methods share: noising processes, and measures of how good samples are."""
