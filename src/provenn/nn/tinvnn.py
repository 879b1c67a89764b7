"""Revisiting Transformation Invariant Geometric Deep Learning: Are Initial Representations All You Need?

Zhang, Wang, Zhang, Zhu, 2021. https://arxiv.org/abs/2112.12345

A network on points need not be built invariant: it is enough that the coordinates it gets are. Coordinates made of the
points' distances alone, by multidimensional scaling, keep all distances and know no pose, so that

    f(MDS(distances of X))

is invariant to rotation, reflection, shift and (scaled) size for every network f, and to order if f is; and if f can
approximate every function of point sets, so can the composition every invariant one.

The rooms: ``_tinvnn_mds`` (the coordinates), ``_tinvnn_backbones`` and ``_tinvnn_tsp`` (networks to put behind them),
``_tinvnn_probe`` (the measurement); here is the wrapper.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn._tinvnn_backbones import DGCNNBackbone, PointNetBackbone
from provenn.nn._tinvnn_mds import InvariantMDS, centre
from provenn.nn._tinvnn_probe import probe_invariance
from provenn.nn._tinvnn_tsp import TSPAttention

__all__ = ["DGCNNBackbone", "InvariantMDS", "PointNetBackbone", "TSPAttention", "TinvWrapper", "probe_invariance"]


class TinvWrapper(nn.Module):
    """Put invariant coordinates in front of any network on points.

    Args:
        backbone: Called as ``backbone(points)``, or ``backbone(points, mask)`` where there is a mask.
        mds: Makes the coordinates. With ``sign="frame"`` the backbone's outputs are averaged over all 2^d signs.

    Shape:
        Points (batch, N, D), ``features`` (batch, N, F), ``mask`` (batch, N); outputs as the backbone gives them.

    Returns:
        The backbone's outputs on the coordinates, followed by the features.

    Raises:
        TypeError: ``backbone`` or ``mds`` is of another type.
        ValueError: As :class:`InvariantMDS`; features of another number of points.

    Cost: the coordinates' and the backbone's; with ``sign="frame"`` 2^d times the backbone's.

    Source: Zhang, Wang, Zhang & Zhu (2021), section 3; frames: Puny et al., "Frame averaging", ICLR 2022.
    """

    def __init__(self, backbone: nn.Module, mds: InvariantMDS) -> None:
        super().__init__()
        for name, module, kind in (("backbone", backbone, nn.Module), ("mds", mds, InvariantMDS)):
            if not isinstance(module, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(module).__name__}")
        self.backbone, self.mds = backbone, mds

    def forward(
        self,
        X: Float[Tensor, "batch points dim"],
        features: Float[Tensor, "batch points features"] | None = None,
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Any:
        """Return the backbone's outputs.

        Args:
            X: Points.
            features: What is known of each point beside its place; it must be invariant itself.
            mask: Which of them are points; all without it.
        """
        if features is not None and features.shape[:2] != X.shape[:2]:
            raise ValueError(f"features must be {tuple(X.shape[:2])} and more, got {tuple(features.shape)}")
        Z = self.mds(X, mask)
        if self.mds.sign != "frame":
            return self._backbone(Z, features, mask)
        signs = torch.tensor(list(product((1.0, -1.0), repeat=Z.shape[2])), device=Z.device, dtype=Z.dtype)
        many = (signs[:, None, None] * Z).flatten(0, 1)
        known = None if features is None else features.repeat(len(signs), 1, 1)
        masks = None if mask is None else mask.repeat(len(signs), 1)
        return self._backbone(many, known, masks).unflatten(0, (len(signs), X.shape[0])).mean(0)

    def _backbone(self, Z: Tensor, features: Tensor | None, mask: Tensor | None) -> Any:
        points = Z if features is None else torch.cat((Z, features), 2)
        return self.backbone(points) if mask is None else self.backbone(points, mask)

    def inverse(
        self,
        prediction: Float[Tensor, "batch rows dim"],
        X: Float[Tensor, "batch points space"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Float[Tensor, "batch rows space"]:
        """Map predicted places from the invariant coordinates back to where the points are.

        The map is the rotation or reflection, scale and shift that takes the coordinates of ``X`` to ``X``: what is
        predicted then turns and moves as the points do.

        Args:
            prediction: Places in the invariant coordinates.
            X: Points.
            mask: Which of them are points.

        Returns:
            Places in the space of ``X``.

        Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31 (1966).
        """
        Z = self.mds(X, mask)
        centred, counts = centre(X, mask)
        U, _, Vh = torch.linalg.svd(Z.mT.to(centred) @ centred, full_matrices=False)
        size = centred.square().sum((1, 2)).sqrt() / Z.to(centred).square().sum((1, 2)).sqrt()
        real = X.to(centred) if mask is None else X.to(centred).masked_fill(~mask[..., None], 0)
        mean = real.sum(1, keepdim=True) / counts[:, None, None]
        return (size[:, None, None] * prediction.to(centred) @ U @ Vh + mean).to(X.dtype)
