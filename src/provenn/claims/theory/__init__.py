"""Claims of the papers on theory that can be run."""
