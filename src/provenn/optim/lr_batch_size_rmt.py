"""Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training.

Granziol, Zohren, Roberts, JMLR 2022. https://arxiv.org/abs/2006.09092

How much larger the curvature of a batch is than that of all data, in closed form and measured; the rules for learning
rate, momentum and damping that follow; and a scheduler that sets rate and momentum from a measured spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.seeding import generator
from provenn.core.numerics.krylov import Operator, lanczos
from provenn.core.numerics.spectra import Spectrum
from provenn.optim._lr_batch_size_rmt_products import Curvature, CurvatureMatrix, LossFn, measuring, noise_variance
from provenn.optim._lr_batch_size_rmt_report import BatchCurvature, BatchHessianReport
from provenn.optim._lr_batch_size_rmt_rules import (
    critical_batch_size,
    effective_batch_size,
    max_learning_rate,
    minimal_damping,
    polyak_parameters,
    spiked_wigner_edge,
    spiked_wigner_overlap,
    spiked_wishart_edge,
    spiked_wishart_overlap,
    suggest_damping,
    suggest_lr,
    wigner_bulk_radius,
    wigner_spike,
    wishart_spike,
)
from provenn.optim._lr_batch_size_rmt_scheduler import SpectralLRScheduler

__all__ = [
    "BatchHessianProbe",
    "BatchHessianReport",
    "SpectralLRScheduler",
    "critical_batch_size",
    "effective_batch_size",
    "max_learning_rate",
    "minimal_damping",
    "noise_variance",
    "polyak_parameters",
    "spiked_wigner_edge",
    "spiked_wigner_overlap",
    "spiked_wishart_edge",
    "spiked_wishart_overlap",
    "suggest_damping",
    "suggest_lr",
    "wigner_bulk_radius",
    "wigner_spike",
    "wishart_spike",
]


class _Extremes(NamedTuple):
    largest: float
    smallest: float
    vector: Tensor
    spectrum: Spectrum


class BatchHessianProbe:
    """Measure how the curvature of batches exceeds that of all data, beside what random matrix theory predicts.

    The theory takes the noise as spread evenly over all P² entries. A network's is concentrated in few directions, its
    top eigenvectors among them, so that the measured rise of λ₁ can be hundreds of times the predicted. The report has
    both, and beside them the prediction from the noise along φ₁ alone, which that rise follows to second order.

    Args:
        model: The network; measured in eval mode and left as found.
        loss_fn: ``loss_fn(outputs, targets)`` → the mean over samples, or one value a sample.
        dataset: Pairs of input and target; held in memory while it is measured.
        matrix: ``"hessian"``, with the spiked Wigner theorem, or ``"ggn"``, with the spiked Wishart theorem.
        lanczos_steps: Lanczos steps for every spectrum, at most P are taken.
        num_vectors: Random starts for the spectrum of all data.
        batches: Batches drawn for each size.
        seed: Seed of batches and vectors.

    Raises:
        ValueError: ``lanczos_steps`` < 2, ``num_vectors`` or ``batches`` < 1, ``matrix`` is unknown, ``loss_fn`` sums
            over samples, or the data set has fewer than 2.

    Cost: ``num_vectors · lanczos_steps`` products with the curvature of all data (about 4 passes each), and for each
    size ``2 · batches`` of them and ``batches · (lanczos_steps + 2)`` with that of a batch; memory of ``lanczos_steps``
    vectors, and one more a batch of a size.

    Source: arXiv 2006.09092, theorems of the batch Hessian and of the batch Gauss–Newton matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        dataset: Dataset,
        matrix: CurvatureMatrix = "hessian",
        lanczos_steps: int = 100,
        num_vectors: int = 1,
        batches: int = 8,
        *,
        seed: int = 0,
    ) -> None:
        self._curvature = Curvature(model, loss_fn, dataset, matrix)
        check_integer("lanczos_steps", lanczos_steps, at_least=2)
        check_integer("num_vectors", num_vectors, at_least=1)
        check_integer("batches", batches, at_least=1)
        self.lanczos_steps, self.num_vectors, self.batches, self.seed = lanczos_steps, num_vectors, batches, seed

    def report(self, batch_sizes: Sequence[int]) -> BatchHessianReport:
        """Measure all data and batches of each size.

        Args:
            batch_sizes: Sizes B; a batch is drawn without replacement.

        Returns:
            The report. Where all sizes are N, σ² is measured on batches of half the data.

        Raises:
            ValueError: There is no size, a size is < 1 or > N, or the loss is not finite or not a mean.
        """
        n = self._curvature.samples
        if len(batch_sizes) == 0:
            raise ValueError("batch_sizes must name at least one size, got none")
        for batch in batch_sizes:
            check_integer("batch_sizes", batch, at_least=1, at_most=n)
        draws = generator(self.seed, "batch hessian")
        everything = self._curvature.batches(torch.arange(n, device="cpu"))
        with measuring(self._curvature.model):
            self._curvature.check_loss(everything)
            whole = self._curvature.operator(everything)
            full = self._extremes(whole, self.num_vectors, draws)
            drawn = {batch: self._draw(batch, draws) for batch in dict.fromkeys(batch_sizes)}
            noisy = {batch: some for batch, some in drawn.items() if batch < n}
            variances = {batch: self._variance(whole, some, batch, draws) for batch, some in noisy.items()}
            if not noisy:
                noisy = {n // 2: self._draw(n // 2, draws)}
            pooled = variances or {n // 2: self._variance(whole, noisy[n // 2], n // 2, draws)}
            along = [self._variance(whole, some, batch, draws, full.vector) for batch, some in noisy.items()]
            theory = _Theory(self._curvature.matrix, full, _mean(pooled.values()), _mean(along), n)
            rows = tuple(
                theory.compare(batch, variances.get(batch, math.nan), [self._extremes(one, 1, draws) for one in some])
                for batch, some in drawn.items()
            )
        return theory.report(rows)

    def _draw(self, batch: int, draws: torch.Generator) -> list[Operator]:
        n = self._curvature.samples
        picked = [torch.randperm(n, generator=draws, device=draws.device)[:batch] for _ in range(self.batches)]
        return [self._curvature.operator(self._curvature.batches(one)) for one in picked]

    def _variance(
        self,
        whole: Operator,
        parts: Sequence[Operator],
        batch: int,
        draws: torch.Generator,
        direction: Tensor | None = None,
    ) -> float:
        return noise_variance(whole, parts, self._curvature.vector(), batch, self._curvature.samples, draws, direction)

    def _extremes(self, operator: Operator, starts: int, draws: torch.Generator) -> _Extremes:
        """Return the extreme Ritz values, the top Ritz vector, and the quadrature of the spectrum."""
        like = self._curvature.vector()
        best: tuple[float, Tensor] | None = None
        nodes, weights = [], []
        for _ in range(starts):
            start = torch.randn(like.shape, generator=draws, device=draws.device, dtype=like.dtype).to(like.device)
            found = lanczos(operator, start, min(self.lanczos_steps, len(like)))
            values, vectors = found.ritz()
            top = values[-1].item()
            if best is None or top > best[0]:
                best = top, found.vectors.T @ vectors[:, -1]
            nodes.append(values)
            weights.append(vectors[0].square() / starts)
        assert best is not None
        order = torch.cat(nodes).argsort()
        spectrum = Spectrum(torch.cat(nodes)[order], torch.cat(weights)[order])
        return _Extremes(best[0], spectrum.nodes[0].item(), best[1], spectrum)


class _Theory:
    """What the theorems say of batches, given all data's spectrum and σ²."""

    def __init__(self, matrix: str, full: _Extremes, sigma2: float, sigma2_top: float, n: int) -> None:
        self.matrix, self.full, self.sigma2, self.sigma2_top, self.n = matrix, full, sigma2, sigma2_top, n
        self.dim = len(full.vector)
        trace = full.spectrum.moment(1).item() * self.dim
        self.scale = max(0.0, (trace - full.largest) / max(1, self.dim - 1))

    def compare(self, batch: int, sigma2: float, found: Sequence[_Extremes]) -> BatchCurvature:
        """Put the measurements of batches of one size beside the predictions."""
        largest = torch.tensor([one.largest for one in found], dtype=torch.float64)
        overlaps = [min(1.0, (one.vector @ self.full.vector).item() ** 2) for one in found]
        low, high, overlap, radius = self._predict(batch)
        mean = largest.mean().item()
        return BatchCurvature(
            batch=batch,
            effective_batch=effective_batch_size(batch, self.n),
            sigma2=sigma2,
            largest_measured=mean,
            largest_deviation=largest.std().item() if len(found) > 1 else 0.0,
            largest_predicted=high,
            largest_along_top=spiked_wigner_edge(self.full.largest, self.sigma2_top, self.dim, batch, self.n),
            smallest_measured=sum(one.smallest for one in found) / len(found),
            smallest_predicted=low,
            overlap_measured=sum(overlaps) / len(overlaps),
            overlap_predicted=overlap,
            bulk_radius=radius,
            max_lr_measured=_rate(mean),
            max_lr_predicted=_rate(high),
        )

    def _predict(self, batch: int) -> tuple[float, float, float, float]:
        """Return a batch's λ_P and λ₁, the overlap of the top eigenvectors, and half the bulk's width."""
        high, low = self.full.largest, self.full.smallest
        if batch == self.n:
            return low, high, 1.0, 0.0
        if self.matrix == "hessian":
            law = (self.sigma2, self.dim, batch, self.n)
            lower = -spiked_wigner_edge(max(0.0, -low), *law)  # below 0, whatever the sign of λ_P
            spike = max(0.0, high)
            return lower, spiked_wigner_edge(spike, *law), spiked_wigner_overlap(spike, *law), wigner_bulk_radius(*law)
        high = max(0.0, high)
        root = math.sqrt(self.dim / effective_batch_size(batch, self.n))
        lower = self.scale * max(0.0, 1 - root) ** 2  # a batch of rank below P has the eigenvalue 0
        wishart = (self.scale, self.dim, batch, self.n)
        width = 2 * root * self.scale
        return lower, spiked_wishart_edge(high, *wishart), spiked_wishart_overlap(high, *wishart), width

    def report(self, rows: tuple[BatchCurvature, ...]) -> BatchHessianReport:
        """Put everything together."""
        top = self.full.largest
        return BatchHessianReport(
            matrix=self.matrix,
            parameters=self.dim,
            samples=self.n,
            sigma2=self.sigma2,
            sigma2_top=self.sigma2_top,
            largest=top,
            smallest=self.full.smallest,
            scale=self.scale,
            critical_batch=self._critical(self.sigma2),
            critical_batch_top=self._critical(self.sigma2_top),
            max_lr=_rate(top),
            nodes=tuple(self.full.spectrum.nodes.tolist()),
            weights=tuple(self.full.spectrum.weights.tolist()),
            batches=rows,
        )

    def _critical(self, sigma2: float) -> float:
        top = self.full.largest
        return critical_batch_size(top, sigma2, self.dim, self.n) if top > 0 else math.inf


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _rate(lam: float) -> float:
    return max_learning_rate(lam) if lam > 0 else math.inf
