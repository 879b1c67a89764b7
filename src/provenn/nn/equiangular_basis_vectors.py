"""Equiangular Basis Vectors.

Shen, Sun, Wei, CVPR 2023. https://arxiv.org/abs/2303.11637

A classifier without a trained classification layer: each class has a fixed unit vector v_k, any two of them nearly
orthogonal (|⟨v_i, v_j⟩| ≤ α), and the network learns to point its embedding z at its class:

    logits = z Vᵀ / (τ ‖z‖),   prediction = argmax_k ⟨z, v_k⟩

The rooms: ``_equiangular_basis_vectors_generation`` finds the vectors; here are the heads and the loss.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.nn._equiangular_basis_vectors_generation import EBVReport, equiangular_basis, extended_basis

__all__ = ["CosineHead", "EBVHead", "EBVLoss", "SimplexETFHead", "equiangular_basis"]

_SMALLEST = 1e-12
"""Embeddings shorter than this have no direction."""


def _directions(z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Scale embeddings to length 1.

    Raises:
        ValueError: One is too short to have a direction.
    """
    lengths = z.norm(dim=1, keepdim=True)
    # Compiled code cannot look at values: there a zero embedding gives zero logits.
    if not torch.compiler.is_compiling() and not z.is_meta and bool((lengths < _SMALLEST).any()):
        row = int((lengths < _SMALLEST).flatten().nonzero()[0])
        raise ValueError(f"z must not be zero, got a norm below {_SMALLEST:g} in row {row}")
    return z / lengths.clamp(min=_SMALLEST)


class _DirectionHead(nn.Module):
    """A linear map to an embedding, compared in angle with class vectors that are never trained.

    Args:
        in_features: Width of the backbone's output.
        basis: The class vectors, of length 1.
        tau: Temperature.
    """

    basis: Tensor

    def __init__(self, in_features: int, basis: Float[Tensor, "classes dim"], tau: float) -> None:
        super().__init__()
        check_integer("in_features", in_features, at_least=1)
        check_number("tau", tau, above=0)
        self.tau = tau
        self.linear = nn.Linear(in_features, basis.shape[1])
        self.register_buffer("basis", basis.to(self.linear.weight))

    def embed(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Return the embedding z, not normalised.

        Args:
            x: The backbone's output.
        """
        z: Tensor = self.linear(x)
        return z

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the logits ⟨z, v_k⟩ / (τ‖z‖), for cross-entropy.

        Args:
            x: The backbone's output.

        Raises:
            ValueError: The embedding of a sample is zero.
        """
        return _directions(self.embed(x)) @ self.basis.T / self.tau

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch features"]) -> Int[Tensor, " batch"]:
        """Return the class whose vector is nearest in angle.

        Args:
            x: The backbone's output.
        """
        return (self.embed(x) @ self.basis.T).argmax(dim=1)


class EBVHead(_DirectionHead):
    """A classification head of fixed, nearly orthogonal class vectors.

    Args:
        in_features: Width of the backbone's output.
        num_classes: Classes N ≥ 2.
        dim: Width d of the embedding; it may be smaller than N.
        basis: The class vectors, scaled to length 1 on entry; without them :func:`equiangular_basis` finds some, the
            same for the same N and d.
        tau: Temperature τ of the logits.

    Shape:
        Input (batch, in_features), output (batch, num_classes).

    Returns:
        Logits; scaling the embedding changes nothing.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range, a ``basis`` of another shape or with a zero row; on a call, an embedding that
            is zero.

    Cost: d(in_features + 1) parameters, whatever N is, where a linear classifier has N(in_features + 1); the vectors
    add N·d numbers of memory and N·d multiplications a sample. Building it costs what :func:`equiangular_basis` does.

    Source: Shen, Sun & Wei (2023), section 3; τ and the initial ``nn.Linear`` as in the authors' training code.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dim: int,
        basis: Float[Tensor, "classes dim"] | None = None,
        tau: float = 0.07,
    ) -> None:
        check_integer("num_classes", num_classes, at_least=2)
        check_integer("dim", dim, at_least=1)
        if basis is None:
            basis, _ = equiangular_basis(num_classes, dim)
        elif basis.shape != (num_classes, dim):
            raise ValueError(f"basis must be ({num_classes}, {dim}), got {tuple(basis.shape)}")
        super().__init__(in_features, _unit_rows(basis), tau)

    def extend(self, n_new: int, alpha: float | None = None, steps: int = 10_000) -> EBVReport:
        """Append classes: their vectors are found beside the present ones, which stay as they are.

        Args:
            n_new: How many classes.
            alpha: As for :func:`equiangular_basis`, for pairs with at least one new vector.
            steps: At most so many steps.

        Returns:
            A report over all pairs, old ones included.

        Raises:
            TypeError: A number is of the wrong type.
            ValueError: A number out of range.
        """
        grown, report = extended_basis(self.basis, n_new, alpha, steps)
        self.basis = grown
        return report


class SimplexETFHead(_DirectionHead):
    """A classification head whose class vectors are the corners of a simplex: ⟨v_i, v_j⟩ = −1/(N − 1) for all pairs.

    Args:
        in_features: Width of the backbone's output.
        num_classes: Classes N ≥ 2.
        dim: Width of the embedding, at least N − 1.
        tau: Temperature τ of the logits.

    Shape:
        Input (batch, in_features), output (batch, num_classes).

    Returns:
        Logits.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range; on a call, an embedding that is zero.

    Cost: as :class:`EBVHead`, with d ≥ N − 1.

    Source: Papyan, Han & Donoho, "Prevalence of neural collapse", PNAS 117 (2020), definition 1.
    """

    def __init__(self, in_features: int, num_classes: int, dim: int, tau: float = 0.07) -> None:
        check_integer("num_classes", num_classes, at_least=2)
        check_integer("dim", dim)
        if dim < num_classes - 1:
            raise ValueError(f"dim must be at least num_classes − 1 = {num_classes - 1}, got {dim}")
        super().__init__(in_features, _simplex(num_classes, dim), tau)


def _simplex(classes: int, dim: int) -> Float[Tensor, "classes dim"]:
    """Return the corners of a regular simplex, of length 1, in the first N − 1 coordinates."""
    centred = torch.eye(classes, dtype=torch.float64, device="cpu") - 1 / classes
    # Columns of an orthonormal basis of the plane ⟨x, 1⟩ = 0, in which the corners lie.
    plane = torch.linalg.qr(centred[:, 1:]).Q
    corners = math.sqrt(classes / (classes - 1)) * plane
    return F.pad(corners, (0, dim - classes + 1))


class CosineHead(nn.Module):
    """A classification head of trained class vectors, compared in angle: the cosine classifier.

    Args:
        in_features: Width of the backbone's output.
        num_classes: Classes.
        tau: Temperature τ of the logits.

    Shape:
        Input (batch, in_features), output (batch, num_classes).

    Returns:
        Logits ⟨x, w_k⟩ / (τ ‖x‖ ‖w_k‖).

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range; on a call, an input that is zero.

    Cost: N·in_features parameters and multiplications a sample.

    Source: Zhai & Wu, "Classification is a strong baseline for deep metric learning", BMVC 2019.
    """

    def __init__(self, in_features: int, num_classes: int, tau: float = 0.07) -> None:
        super().__init__()
        check_integer("in_features", in_features, at_least=1)
        check_integer("num_classes", num_classes, at_least=2)
        check_number("tau", tau, above=0)
        self.tau = tau
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return the logits.

        Args:
            x: The backbone's output.

        Raises:
            ValueError: An input is zero.
        """
        return _directions(x) @ F.normalize(self.weight, dim=1).T / self.tau

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch features"]) -> Int[Tensor, " batch"]:
        """Return the class whose vector is nearest in angle.

        Args:
            x: The backbone's output.
        """
        return (x @ F.normalize(self.weight, dim=1).T).argmax(dim=1)


class EBVLoss(nn.Module):
    """Points embeddings at the fixed vectors of their classes.

    Args:
        tau: Temperature τ; read by ``"softmax"`` alone.
        label_smoothing: ε of smoothed targets; read by ``"softmax"`` alone. The authors train ImageNet with 0.1.
        mode: ``"softmax"``: cross-entropy over the angles to all class vectors; ``"angle"``: the angle to the own class
            vector, in radians, without negatives.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Shape:
        ``z`` (batch, d), ``labels`` (batch,), ``basis`` (classes, d) with rows of length 1. Scalar, or (batch,) for
        ``"none"``.

    Returns:
        The loss. It does not depend on the length of z, so that its gradient is orthogonal to z.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: An option out of range; on a call, a label outside 0 … classes − 1, a zero embedding, shapes that do
            not fit.

    Cost: N·d multiplications a sample; ``"angle"`` d.

    Source: Shen, Sun & Wei (2023), equations 5–7.
    """

    def __init__(
        self, tau: float = 0.07, label_smoothing: float = 0.0, mode: str = "softmax", reduction: str = "mean"
    ) -> None:
        super().__init__()
        check_number("tau", tau, above=0)
        check_number("label_smoothing", label_smoothing, at_least=0, below=1)
        if mode not in ("softmax", "angle"):
            raise ValueError(f"mode must be softmax or angle, got {mode!r}")
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")
        self.tau, self.label_smoothing, self.mode, self.reduction = tau, label_smoothing, mode, reduction

    def forward(
        self, z: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], basis: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            z: Embeddings, of any length but zero; ``EBVHead.embed`` gives them.
            labels: Classes.
            basis: Class vectors; ``EBVHead.basis``.
        """
        if len(z) != len(labels) or z.shape[1] != basis.shape[1]:
            raise ValueError(f"z must be ({len(labels)}, {basis.shape[1]}), got {tuple(z.shape)}")
        if not torch.compiler.is_compiling() and not z.is_meta:
            _check_labels(labels, len(basis))
        directions = _directions(z)
        if self.mode == "softmax":
            logits = directions @ basis.T / self.tau
            return F.cross_entropy(logits, labels, reduction=self.reduction, label_smoothing=self.label_smoothing)
        own = basis[labels]
        # Unlike arccos, this keeps its digits, and a finite gradient, where the two agree.
        angles = 2 * torch.atan2((directions - own).norm(dim=1), (directions + own).norm(dim=1))
        return angles if self.reduction == "none" else angles.mean() if self.reduction == "mean" else angles.sum()


def _check_labels(labels: Int[Tensor, " batch"], classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"labels must be 0 … {classes - 1}, got {int(outside[0])}")


def _unit_rows(basis: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
    lengths = basis.norm(dim=1, keepdim=True)
    if not basis.is_meta and not bool((lengths > _SMALLEST).all()):
        raise ValueError(f"basis must have no zero row, got a norm of {lengths.min().item():g}")
    return basis.detach() / lengths
