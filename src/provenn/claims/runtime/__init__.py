"""Claims of the papers on pipelines, data paths, distribution."""
