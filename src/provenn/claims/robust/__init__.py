"""Claims of the papers on attacks and defences."""
