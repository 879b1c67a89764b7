"""Claims of the papers on 3-D scenes and meshes."""
