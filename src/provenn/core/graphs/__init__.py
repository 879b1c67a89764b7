"""What graph networks share: adjacency matrices, their normalisations, and propagation along edges."""
