"""Masks, prune loops and what else compressors share."""
