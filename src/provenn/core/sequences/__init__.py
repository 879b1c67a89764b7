"""Sequences: attention without the matrix of weights, positions, masks, and the call of multi-head attention."""
