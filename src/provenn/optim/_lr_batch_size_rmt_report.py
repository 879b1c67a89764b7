"""What the probe of batch curvature reports: all data, and batches of every size, measured and predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from provenn.core.experiment.reports import Report
from provenn.optim._lr_batch_size_rmt_rules import Kind, suggest_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BatchCurvature(Report):
    """The extreme curvature of batches of one size, measured (means over batches) and predicted.

    Attributes:
        batch: B.
        effective_batch: 𝔟 = B/(1 − B/N).
        sigma2: σ² from batches of this size; NaN at B = N.
        largest_measured: Mean of λ₁(H_B).
        largest_deviation: Its standard deviation over batches; 0 for a single batch.
        largest_predicted: By the theorem.
        largest_along_top: By the spiked Wigner theorem with ``sigma2_top`` of the report for σ².
        smallest_measured: Mean of λ_P(H_B).
        smallest_predicted: By the theorem.
        overlap_measured: Mean of ⟨φ₁, φ₁ᴮ⟩².
        overlap_predicted: By the theorem.
        bulk_radius: Half the width of the noise's bulk.
        max_lr_measured: 2/λ₁(H_B) of the measured mean; infinity if that is not positive.
        max_lr_predicted: Likewise of the predicted one.
    """

    batch: int
    effective_batch: float
    sigma2: float
    largest_measured: float
    largest_deviation: float
    largest_predicted: float
    largest_along_top: float
    smallest_measured: float
    smallest_predicted: float
    overlap_measured: float
    overlap_predicted: float
    bulk_radius: float
    max_lr_measured: float
    max_lr_predicted: float


@dataclass(frozen=True)
class BatchHessianReport(Report):
    """The curvature of all data and of its batches.

    Attributes:
        matrix: ``"hessian"`` or ``"ggn"``.
        parameters: P.
        samples: N.
        sigma2: σ², the mean over batch sizes.
        sigma2_top: σ² as the noise along φ₁ alone has it, likewise; where it exceeds ``sigma2``, the noise is not
            spread evenly.
        largest: λ₁ of all data.
        smallest: λ_P of all data.
        scale: Mean of all eigenvalues but the largest: s² of the Gauss–Newton matrix' theorem.
        critical_batch: B*, from which on the largest stable rate is about flat; infinity without positive curvature.
        critical_batch_top: B* with ``sigma2_top`` for σ².
        max_lr: 2/λ₁, the largest stable rate on all data.
        nodes: Ritz values of the spectrum of all data.
        weights: Their weights.
        batches: One entry a batch size.

    Source: arXiv 2006.09092.
    """

    nested: ClassVar[dict[str, type[Report]]] = {"batches": BatchCurvature}

    matrix: str
    parameters: int
    samples: int
    sigma2: float
    sigma2_top: float
    largest: float
    smallest: float
    scale: float
    critical_batch: float
    critical_batch_top: float
    max_lr: float
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    batches: tuple[BatchCurvature, ...]

    def suggest_lr(self, lr: float, from_batch: int, to_batch: int, kind: Kind = "sgd") -> float:
        """Carry a rate to another batch size by :func:`suggest_lr`, flat above ``critical_batch_top``.

        Args:
            lr: The rate at ``from_batch``.
            from_batch: Batch at which it is right.
            to_batch: Batch to carry it to.
            kind: ``"sgd"`` or ``"adaptive"``.

        Returns:
            The rate at ``to_batch``.

        Raises:
            ValueError: As :func:`suggest_lr`.
        """
        star = self.critical_batch_top
        bound = max(1.0, star) if math.isfinite(star) else None
        return suggest_lr(from_batch, to_batch, kind, lr=lr, critical_batch=bound, n=self.samples)

    def plot(self) -> Figure:
        """Draw measured and predicted λ₁ and largest stable rate by batch size, and the spectrum of all data."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.5), layout="constrained")
        edges, rates, density = figure.subplots(1, 3)
        sizes = [one.batch for one in self.batches]
        deviations = [one.largest_deviation for one in self.batches]
        measured = [one.largest_measured for one in self.batches]
        edges.errorbar(sizes, measured, deviations, fmt="o", label="measured")
        edges.plot(sizes, [one.largest_predicted for one in self.batches], "-", label="predicted")
        edges.plot(sizes, [one.largest_along_top for one in self.batches], "--", label="noise along φ₁")
        edges.axhline(self.largest, ls=":", color="gray", label="all data")
        edges.set(xscale="log", xlabel="batch size", ylabel="largest eigenvalue")
        rates.plot(sizes, [one.max_lr_measured for one in self.batches], "o", label="measured")
        rates.plot(sizes, [one.max_lr_predicted for one in self.batches], "-", label="predicted")
        if math.isfinite(self.critical_batch_top):
            rates.axvline(self.critical_batch_top, ls=":", color="gray", label="critical batch")
        rates.set(xscale="log", yscale="log", xlabel="batch size", ylabel="largest stable rate")
        density.vlines(self.nodes, 0, self.weights)
        density.set(yscale="log", xlabel="eigenvalue", ylabel="share of the spectrum")
        edges.legend()
        rates.legend()
        return figure
