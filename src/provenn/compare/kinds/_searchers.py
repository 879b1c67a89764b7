"""Searchers to compare with: random points, a Sobol sequence, and BoTorch with its own defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.seeding import generator, seeded


class Best(NamedTuple):
    """A point and the value told of it."""

    point: Tensor
    value: float


class Told:
    """Keeps what was told; the best is the largest value. What failed (NaN, infinite) is left out.

    Args:
        bounds: Lower and upper bounds.
        seed: Draws the points.
    """

    def __init__(self, bounds: Float[Tensor, "2 dimensions"], seed: int = 0) -> None:
        self.bounds = bounds
        self.seed = seed
        self.points: list[Tensor] = []
        self.values: list[float] = []

    def tell(self, points: Float[Tensor, "n dimensions"], values: Sequence[float]) -> None:
        """Take what points are worth."""
        for point, value in zip(points, values, strict=True):
            if math.isfinite(value):
                self.points.append(point)
                self.values.append(float(value))

    @property
    def best(self) -> Best:
        """Return the best point told, with its value."""
        if not self.values:
            raise RuntimeError("nothing was told yet that has a value")
        place = max(range(len(self.values)), key=self.values.__getitem__)
        return Best(self.points[place], self.values[place])

    def scaled(self, shares: Float[Tensor, "n dimensions"]) -> Float[Tensor, "n dimensions"]:
        """Map points of the unit cube into the bounds."""
        low, high = self.bounds
        points: Tensor = low + (high - low) * shares.to(self.bounds)
        return points


class RandomSearch(Told):
    """Draws points uniformly."""

    def __init__(self, bounds: Float[Tensor, "2 dimensions"], seed: int = 0) -> None:
        super().__init__(bounds, seed)
        self._draws = generator(seed, "random search")

    def ask(self, n: int) -> Float[Tensor, "n dimensions"]:
        """Return n points."""
        return self.scaled(torch.rand(n, self.bounds.shape[1], dtype=torch.float64, generator=self._draws))


class SobolSearch(Told):
    """Takes the points of a scrambled Sobol sequence."""

    def __init__(self, bounds: Float[Tensor, "2 dimensions"], seed: int = 0) -> None:
        super().__init__(bounds, seed)
        self._sequence = torch.quasirandom.SobolEngine(bounds.shape[1], scramble=True, seed=seed)

    def ask(self, n: int) -> Float[Tensor, "n dimensions"]:
        """Return n points."""
        return self.scaled(self._sequence.draw(n, dtype=torch.float64))


class BoTorchSearch(Told):
    """BoTorch as its guide recommends: ``SingleTaskGP`` on the unit cube, ``qLogNoisyExpectedImprovement``, five
    restarts; it starts with 2 (d + 1) Sobol points. The best is the point told of the largest posterior mean.

    Raises:
        ImportError: BoTorch is not installed.

    Source: botorch.org, "Getting started".
    """

    def __init__(self, bounds: Float[Tensor, "2 dimensions"], seed: int = 0) -> None:
        try:
            import botorch  # noqa: F401
        except ImportError as error:
            raise ImportError("BoTorch is missing: pip install 'provenn[search]'") from error
        super().__init__(bounds, seed)
        self._first = SobolSearch(bounds, seed)
        self._asked = 0
        self._fitted: tuple[int, Any] | None = None

    def ask(self, n: int) -> Float[Tensor, "n dimensions"]:
        """Return n points: of the Sobol sequence while there are few, then those that the acquisition picks jointly."""
        start = 2 * (self.bounds.shape[1] + 1)
        self._asked += n
        if self._asked <= start or len(self.values) < 2:
            return self._first.ask(n)
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.optim import optimize_acqf

        with seeded(self.seed, "botorch", self._asked):  # it takes no generator
            acquisition = qLogNoisyExpectedImprovement(self._model(), self._shares())
            cube = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, self.bounds.shape[1])
            points, _ = optimize_acqf(acquisition, cube.to(self.bounds.device), n, num_restarts=5, raw_samples=128)
        return self.scaled(points.detach())

    @property
    def best(self) -> Best:
        """Return the point told that the model believes in most, with the value told."""
        if len(self.values) < 2:
            return super().best
        place = int(self._model().posterior(self._shares()).mean.argmax())
        return Best(self.points[place], self.values[place])

    def _shares(self) -> Tensor:
        low, high = self.bounds.double()
        shares: Tensor = (torch.stack(self.points).double() - low) / (high - low)
        return shares

    def _model(self) -> Any:
        """Return the model of all that was told, fitted once."""
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        if self._fitted is None or self._fitted[0] != len(self.values):
            values = torch.tensor(self.values, dtype=torch.float64, device=self.bounds.device).unsqueeze(-1)
            model = SingleTaskGP(self._shares(), values)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            self._fitted = len(self.values), model
        return self._fitted[1]
