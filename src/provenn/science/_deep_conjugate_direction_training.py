"""Training data from Ritz vectors, and the trainer (arXiv 2205.10763)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator as generator_of
from provenn.core.experiment.training import Epoch, minibatches, train
from provenn.core.numerics.krylov import lanczos
from provenn.core.numerics.sparse import as_csr, csr
from provenn.science._deep_conjugate_direction_network import InverseDirectionLoss

SMALLEST_RITZ_VALUE = 1e-8


class RitzVectorDataset(Dataset[Tensor]):
    r"""Unit vectors that mix A's Ritz vectors, the slow ones boosted: like residuals of a solver at work.

    .. math:: b = \frac{\sum_j c_j q_j}{\lVert \sum_j c_j q_j \rVert}, \qquad
        c_j \sim \begin{cases} 9\,\mathcal N(0, 1) & j < m/2 + \theta \\ \mathcal N(0, 1) & \text{else} \end{cases}

    with Ritz vectors q_j by ascending Ritz value, after those below 1e-8 are dropped, and m the number before that. The
    Ritz vectors come from Lanczos' method with re-orthogonalisation on A, started from A times a Gaussian vector.

    Args:
        A: The matrix, symmetric, dense or sparse, (n, n).
        n_ritz: m, Lanczos steps, at most n.
        n_samples: Samples held.
        theta: θ, by how much the boosted ones exceed half of all.
        boost: The factor on their coefficients.
        generator: Draws start and samples, on the CPU; ``None`` for torch's global one.

    Shape:
        Samples (n,), in torch's default dtype and on A's device.

    Raises:
        ValueError: A is not square, or an argument is out of bounds; A has no Ritz value above 1e-8.
        TypeError: A is no floating-point tensor, or a count is no integer.

    Attributes:
        ritz_values: The Ritz values kept, ascending.
        samples: The samples, (n_samples, n).

    Cost: O(n m² + m³) time once, O(n m) a sample; (m + n_samples) n numbers of memory.

    Source: Kaneda et al., arXiv 2205.10763, section on the training data; counts as in the authors' code.
    """

    def __init__(
        self,
        A: Tensor,
        n_ritz: int = 10_000,
        n_samples: int = 20_000,
        theta: int = 500,
        boost: float = 9.0,
        generator: torch.Generator | None = None,
    ) -> None:
        matrix = as_csr("A", A).double()
        size = matrix.shape[0]
        check_integer("n_ritz", n_ritz, at_least=1, at_most=size)
        check_integer("n_samples", n_samples, at_least=1)
        check_integer("theta", theta)
        check_number("boost", boost, above=0)
        start = matrix @ torch.randn(size, dtype=torch.float64, generator=generator, device="cpu").to(matrix.device)
        found = lanczos(matrix, start, n_ritz)
        ritz_values, mixing = found.ritz()
        kept = ritz_values >= SMALLEST_RITZ_VALUE
        if not kept.any():
            raise ValueError(
                f"A must have a Ritz value above {SMALLEST_RITZ_VALUE}, got {ritz_values.max().item():.3g}"
            )
        self.ritz_values = ritz_values[kept]
        self._vectors = found.vectors
        self._mixing = mixing[:, kept]
        scales = torch.ones_like(self.ritz_values)
        scales[: max(0, n_ritz // 2 + theta)] = boost
        self._scales = scales
        self.samples = self.sample(n_samples, generator)

    @property
    def ritz_vectors(self) -> Float[Tensor, "kept n"]:
        """The Ritz vectors kept, one a row, by ascending Ritz value."""
        return self._mixing.T @ self._vectors

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n cells"]:
        """Draw further samples.

        Args:
            n: How many.
            generator: Draws them, on the CPU; ``None`` for torch's global one.

        Returns:
            Unit vectors, one a row.
        """
        check_integer("n", n, at_least=0)
        normal = torch.randn(n, len(self._scales), dtype=torch.float64, generator=generator, device="cpu")
        coefficients = normal.to(self._scales) * self._scales
        mixtures = (coefficients @ self._mixing.T) @ self._vectors
        return (mixtures / mixtures.norm(dim=1, keepdim=True)).to(torch.get_default_dtype())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Float[Tensor, " n"]:
        return self.samples[index]


@dataclass(frozen=True)
class DCDMTraining:
    """What a training left.

    Args:
        model: The trained network: the one that the trainer was given.
        history: One :class:`~provenn.core.experiment.training.Epoch` an epoch, those before an interruption included.
    """

    model: nn.Module
    history: tuple[Epoch, ...]


class _Recorded(nn.Module):
    """A network that carries its history, so that a checkpoint of it holds the epochs before an interruption too."""

    totals: Tensor

    def __init__(self, model: nn.Module, epochs: int) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self.model = model
        self.epoch = 0
        self.register_buffer("totals", torch.zeros(epochs, dtype=torch.float64, device=device))

    def add(self, value: Tensor) -> None:
        self.totals[self.epoch] += value

    def forward(self, residual: Tensor) -> Tensor:
        output: Tensor = self.model(residual)
        return output


class DCDMTrainer:
    """Train a network, on one matrix and without labels, to imitate its inverse up to length.

    Args:
        model: The network, trained in place; (batch, 1, *grid) to the same shape.
        grid_shape: The grid whose cells are A's unknowns, in C order.
        n_ritz: As in :class:`RitzVectorDataset`.
        n_samples: As in :class:`RitzVectorDataset`.
        theta: As in :class:`RitzVectorDataset`.
        boost: As in :class:`RitzVectorDataset`.
        lr: Adam's learning rate.
        batch_size: Samples a step.
        epochs: Passes over the samples.
        seed: Samples and their order derive from it.

    Raises:
        ValueError: An argument is out of bounds; in :meth:`fit` A does not fit the grid, or the checkpoint this run.
        TypeError: A count is no integer; in :meth:`fit` A is no floating-point tensor.

    Cost: the samples once, as :class:`RitzVectorDataset`; then three forward passes of the network's work a sample an
    epoch.

    Source: Kaneda et al., arXiv 2205.10763, section on training; defaults as in the authors' code, whose Adam has
    ε = 1e-7.
    """

    def __init__(
        self,
        model: nn.Module,
        grid_shape: tuple[int, ...],
        n_ritz: int = 10_000,
        n_samples: int = 20_000,
        theta: int = 500,
        boost: float = 9.0,
        lr: float = 1e-4,
        batch_size: int = 10,
        epochs: int = 1000,
        seed: int = 0,
    ) -> None:
        check_number("lr", lr, above=0)
        for name, value in (("n_ritz", n_ritz), ("n_samples", n_samples), ("batch_size", batch_size)):
            check_integer(name, value, at_least=1)
        check_integer("epochs", epochs, at_least=0)
        check_integer("theta", theta)
        check_number("boost", boost, above=0)
        self.model = model
        self.grid_shape = tuple(grid_shape)
        self.n_ritz = n_ritz
        self.n_samples = n_samples
        self.theta = theta
        self.boost = boost
        self.lr = lr
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed

    def fit(
        self, A: Tensor, checkpoint: str | Path | None = None, progress: Callable[[Epoch], None] | None = None
    ) -> DCDMTraining:
        """Train on a matrix.

        Args:
            A: Symmetric positive definite on the cells that hold an unknown, dense or sparse, (n, n).
            checkpoint: File that holds the state after every epoch; if it exists, training goes on from there, with the
                same number of epochs in all.
            progress: Called after every epoch; what it raises ends the training.

        Returns:
            The network and the history.
        """
        recorded = self._recorded()
        for epoch in self._train(A, recorded, checkpoint):
            if progress is not None:
                progress(epoch)
        return DCDMTraining(self.model, tuple(self._epoch(recorded, index) for index in range(self.epochs)))

    def epochs_on(self, A: Tensor, checkpoint: str | Path | None = None) -> Iterator[Epoch]:
        """Train as :meth:`fit`, as a loop of the caller's own.

        Args:
            A: As in :meth:`fit`.
            checkpoint: As in :meth:`fit`.

        Yields:
            One record after every epoch.
        """
        return self._train(A, self._recorded(), checkpoint)

    def _recorded(self) -> _Recorded:
        return _Recorded(self.model, self.epochs)

    def _epoch(self, recorded: _Recorded, index: int) -> Epoch:
        steps = -(-self.n_samples // self.batch_size)
        return Epoch(index, (index + 1) * steps, recorded.totals[index].item() / self.n_samples)

    def _train(self, A: Tensor, recorded: _Recorded, checkpoint: str | Path | None) -> Iterator[Epoch]:
        matrix = as_csr("A", A)
        size = matrix.shape[0]
        if torch.Size(self.grid_shape).numel() != size:
            raise ValueError(f"A must have the {torch.Size(self.grid_shape).numel()} cells of the grid, got {size}")
        weight = next(self.model.parameters())
        # A's scale falls out of the loss; taking it out first keeps α and fᵀA f within single precision.
        values = matrix.values()
        scaled = csr(matrix.crow_indices(), matrix.col_indices(), values / values.abs().max(), matrix.shape)
        loss = InverseDirectionLoss(scaled).to(weight.device)
        draws = generator_of(self.seed, "ritz vectors")
        arguments = (self.n_ritz, self.n_samples, self.theta, self.boost, draws)
        samples = RitzVectorDataset(matrix, *arguments).samples.to(weight.device, weight.dtype)
        samples = samples.view(-1, 1, *self.grid_shape)

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            recorded.epoch = epoch
            return minibatches((samples,), self.batch_size, generator_of(self.seed, "order", epoch))

        def objective(model: nn.Module, residuals: Tensor) -> Tensor:
            value: Tensor = loss(residuals, model(residuals))
            recorded.add(value.detach() * len(residuals))
            return value

        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, eps=1e-7)
        for epoch in train(recorded, optimizer, batches, objective, epochs=self.epochs, checkpoint=checkpoint):
            yield self._epoch(recorded, epoch.index)
