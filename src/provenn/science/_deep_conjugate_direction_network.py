"""The network that imitates an inverse, and the loss that teaches it without labels (arXiv 2205.10763)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.numerics.sparse import as_csr, check_symmetric, csr, symmetric_product


class _Residual(nn.Module):
    """A pair of convolutions: y = ReLU(conv x), x ← ReLU(conv y) + x."""

    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        self.first = conv(width, width, 3, padding=1)
        self.second = conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)))) + x


class _Fine(nn.Module):
    """The other order of the fine level: a ← ReLU(conv b) + a, b ← ReLU(conv a)."""

    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        self.first = conv(width, width, 3, padding=1)
        self.second = conv(width, width, 3, padding=1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.first(b)) + a
        return a, torch.relu(self.second(a))


class DCDMNet(nn.Module):
    """Map residuals on a grid to search directions, at two resolutions.

    A fine level of convolutions, a coarse one on 2ᵈ-cell averages, and an upward one on their sum; all convolutions are
    3ᵈ with zeros beyond the grid, so that a network runs on any even grid. The authors' network for 64³ is the default,
    that for 128³ and 256³ has ``fine_blocks=2, coarse_blocks=5, up_blocks=3``. Weights start as in the authors' code:
    Glorot-uniform, biases zero.

    Args:
        dim: Dimensions of the grid, 1 to 3.
        width: Channels.
        fine_blocks: Pairs of convolutions on the fine level, beside the three that open it.
        coarse_blocks: Residual pairs on the coarse level.
        up_blocks: Residual pairs on the way up.

    Shape:
        Input and output (batch, 1, *grid), with ``dim`` grid sides, each divisible by 2.

    Raises:
        ValueError: ``dim`` is not 1, 2 or 3, a count is too small, or a grid side cannot be halved.

    Cost: about 3ᵈ w² (2 + 2·fine + 2·up + 2·coarse/2ᵈ) multiply-accumulates a cell; memory w numbers a cell a layer
    in training.

    Source: Kaneda et al., arXiv 2205.10763, figure of the architecture; counts as in the authors' code.
    """

    def __init__(
        self, dim: int = 3, width: int = 16, fine_blocks: int = 1, coarse_blocks: int = 3, up_blocks: int = 2
    ) -> None:
        check_choice("dim", dim, (1, 2, 3))
        check_integer("width", width, at_least=1)
        check_integer("fine_blocks", fine_blocks, at_least=0)
        check_integer("coarse_blocks", coarse_blocks, at_least=0)
        check_integer("up_blocks", up_blocks, at_least=0)
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.dim = dim
        self.enter = conv(1, width, 3, padding=1)
        self.fine_a = conv(width, width, 3, padding=1)
        self.fine_b = conv(width, width, 3, padding=1)
        self.fine = nn.ModuleList(_Fine(conv, width) for _ in range(fine_blocks))
        self.pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dim - 1](2)
        self.coarse = nn.Sequential(*(_Residual(conv, width) for _ in range(coarse_blocks)))
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = nn.Sequential(*(_Residual(conv, width) for _ in range(up_blocks)))
        self.leave = conv(width, 1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights afresh: Glorot-uniform, biases zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, residual: Float[Tensor, "batch 1 *grid"]) -> Float[Tensor, "batch 1 *grid"]:
        """Propose a direction for each residual.

        Args:
            residual: Residuals of unit norm.

        Returns:
            Directions, of no particular length.
        """
        if residual.dim() != self.dim + 2 or residual.shape[1] != 1:
            raise ValueError(
                f"residual must be (batch, 1, *grid) of {self.dim} grid sides, got {tuple(residual.shape)}"
            )
        if any(side % 2 for side in residual.shape[2:]):
            raise ValueError(f"residual must have grid sides divisible by 2, got {tuple(residual.shape[2:])}")
        a = torch.relu(self.fine_a(self.enter(residual)))
        b = torch.relu(self.fine_b(a))
        for block in self.fine:
            a, b = block(a, b)
        return self.leave(self.up(self.enlarge(self.coarse(self.pool(b))) + b))


class InverseDirectionLoss(nn.Module):
    r"""How far A f is from r once f has been given the best length along itself in the A-norm.

    .. math:: \lVert r - \alpha A f \rVert^2, \qquad \alpha = \frac{r^\top f}{f^\top A f}

    Zero where f = c A⁻¹ r for any c ≠ 0, and blind to the length and sign of f. α is the step of the line search, not
    the least-squares one, and gradients go through it. A direction with fᵀA f = 0 gets α = 0.

    Args:
        A: The matrix, symmetric, dense or sparse, (n, n). Not part of the ``state_dict``; used in the
            precision of f.
        reduction: ``"mean"`` over the batch, ``"sum"`` or ``"none"``.

    Shape:
        ``r`` and ``f`` (batch, n), or with n spread over further dimensions, such as (batch, 1, *grid).

    Raises:
        ValueError: A is not square or not symmetric, ``reduction`` is unknown, or r and f do not fit.
        TypeError: A is no floating-point tensor.

    Cost: one product with A a sample, forward and backward each.

    Source: Kaneda et al., arXiv 2205.10763, the loss function (its third section).
    """

    def __init__(self, A: Tensor, reduction: str = "mean") -> None:
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        matrix = as_csr("A", A)
        check_symmetric("A", matrix)
        super().__init__()
        self.reduction = reduction
        self.size = matrix.shape[0]
        # The parts and not the matrix: a sparse tensor in a module can be neither copied nor converted.
        self.register_buffer("row_starts", matrix.crow_indices().clone(), persistent=False)
        self.register_buffer("columns", matrix.col_indices().clone(), persistent=False)
        self.register_buffer("values", matrix.values().clone(), persistent=False)

    def forward(self, r: Float[Tensor, "batch ..."], f: Float[Tensor, "batch ..."]) -> Tensor:
        """Compute the loss.

        Args:
            r: Residuals, of unit norm in training.
            f: Directions that a network proposes for them.

        Returns:
            A scalar, or one value a sample for ``reduction="none"``.
        """
        if r.shape != f.shape or r.dim() < 2 or r[:1].numel() != self.size * min(len(r), 1):
            raise ValueError(
                f"r and f must both be (batch, …) of {self.size} cells, got {tuple(r.shape)} and {tuple(f.shape)}"
            )
        r, f = r.flatten(1), f.flatten(1)
        matrix = csr(self.row_starts, self.columns, self.values.to(f.dtype), (self.size, self.size))
        Af = symmetric_product(matrix, f.T.contiguous()).T
        curvature = (f * Af).sum(1)
        flat = curvature == 0
        alpha = torch.where(flat, 0.0, (r * f).sum(1) / torch.where(flat, 1.0, curvature))
        losses = (r - alpha[:, None] * Af).square().sum(1)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()
