"""Speed of ``provenn.nn.equiangular_basis_vectors`` beside its peer.

Equiangular Basis Vectors (2023).

pytorch-metric-learning (NormalizedSoftmax) for the cosine head; the public generator for max|cos| at (1000, 1000,
0.002).
"""
