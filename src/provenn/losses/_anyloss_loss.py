"""The losses: one minus a metric of an expected or a soft confusion matrix.

Source: Han, Moniz, Chawla, "AnyLoss", KDD 2024, arXiv 2405.14745; and, for the baseline, Marchetti, Guastavino, Piana,
Campi, "Score-oriented loss (SOL) functions", Pattern Recognition 132 (2022), arXiv 2103.15522.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_number
from provenn.losses._anyloss_confusion import ConfusionMatrix, Metric, confusion_metric, count, two_sided_labels
from provenn.losses._anyloss_inputs import aligned, check_probabilities

FLOAT32_SLOPE = 33.0


class _MetricLoss(nn.Module, ABC):
    """One minus a metric of a confusion matrix that the subclass counts."""

    def __init__(
        self,
        metric: str | Metric,
        beta: float,
        threshold: float,
        from_logits: bool,
        empty: str,
        average: str | None,
    ) -> None:
        super().__init__()
        if callable(metric):
            if beta != 1:
                raise ValueError(f"beta must be 1 unless the metric is 'fbeta', got {beta} with a callable")
            self.function = metric
        else:
            try:
                self.function = confusion_metric(metric, beta)
            except ValueError as error:
                raise ValueError(f"metric: {error}") from None
        check_number("threshold", threshold, above=0, below=1)
        check_choice("empty", empty, ("fallback", "skip", "raise"))
        check_choice("average", average, (None, "macro", "micro"))
        self.metric = metric
        self.beta = beta
        self.threshold = threshold
        self.from_logits = from_logits
        self.empty = empty
        self.average = average

    @abstractmethod
    def labels(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the soft labels of probabilities, and their complements."""

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the precision in which scores of a type are worked on: at least float32."""
        return torch.promote_types(dtype, torch.float32)

    def evaluate(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:  # noqa: A002 - torch's name
        """Return one minus the metric of a batch."""
        scores, y, w = aligned(input, target, weight, columns=self.average is not None)
        if not self.from_logits:
            check_probabilities(scores)
        dtype = self.working_dtype(input.dtype)
        scores, y = scores.to(dtype), y.to(dtype)
        p = scores.sigmoid() if self.from_logits else scores
        matrix = count(*self.labels(p), y, None if w is None else w.to(dtype))
        if self.average == "micro":
            matrix = ConfusionMatrix(*(counts.sum() for counts in matrix))
        return self._loss(matrix).mean().to(input.dtype)

    def _loss(self, matrix: ConfusionMatrix) -> Tensor:
        if self.empty == "fallback":
            return 1 - self._value(matrix)
        positives, negatives = matrix.tp + matrix.fn, matrix.fp + matrix.tn
        missing = (positives == 0) | (negatives == 0)
        if self.empty == "raise":
            if not torch.compiler.is_compiling() and bool(missing.any()):
                raise ValueError(
                    "target must hold both classes with empty='raise', got "
                    f"{_listed(positives[missing])} positives and {_listed(negatives[missing])} negatives"
                )
            return 1 - self._value(matrix)
        # The metric sees ones where a class is missing, so that its gradient there is finite before it is dropped.
        safe = ConfusionMatrix(*(torch.where(missing, 1.0, counts) for counts in matrix))
        return torch.where(missing, 0.0, 1 - self._value(safe))

    def _value(self, matrix: ConfusionMatrix) -> Tensor:
        value = self.function(*matrix)
        if not isinstance(value, Tensor) or value.shape != matrix.tp.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"metric must return a tensor of the counts' shape {tuple(matrix.tp.shape)}, got {got}")
        return value

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        name = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "callable")
        return f"{name}, beta={self.beta}, threshold={self.threshold}, empty={self.empty}, average={self.average}"


def _listed(counts: Tensor) -> str:
    return ", ".join(f"{one:g}" for one in counts.flatten().tolist())


class AnyLoss(_MetricLoss):
    r"""One minus a classification metric, made differentiable by a steep sigmoid on the predicted probability.

    .. math::
        A(p) = \frac{1}{1 + e^{-L(p - t)}}, \qquad
        \ell = 1 - \mathrm{metric}\Big(\sum y A(p),\ \sum (1-y) A(p),\ \sum y (1 - A(p)),\ \sum (1-y)(1 - A(p))\Big)

    The counts are those of the batch: use whole data, or batches that hold both classes
    (:class:`~provenn.losses.StratifiedBatchSampler`). Predict 1 where p > t.

    Args:
        metric: A name that :func:`~provenn.losses.confusion_metric` knows, or a function of TP, FP, FN, TN (tensors of
            one shape) that returns what is to be large, elementwise.
        beta: β of ``metric="fbeta"``.
        slope: L > 0. Steeper is nearer to the metric, with less gradient away from the threshold.
        threshold: t in (0, 1).
        from_logits: Whether inputs are logits; else they are probabilities.
        empty: What a batch without one of the classes gives. ``"fallback"``: what of the metric is defined (the other
            class's recall for balanced accuracy, G-mean and Youden's J; 0 of the others where there is nothing to
            divide by; a callable is asked as it is); ``"skip"``: loss 0, still on the graph; ``"raise"``: an error.
        average: For several columns, one-vs-rest (an extension of the paper): ``"macro"`` averages the losses of the
            columns, ``"micro"`` adds up their counts first.
        upcast: Whether to work in float64 where a narrower input cannot hold the slope: above 33, A(1) rounds to 1 in
            float32. ``False`` stays in float32, for devices without float64.

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: An unknown ``metric``, ``empty`` or ``average``; ``beta`` < 0; ``slope`` ≤ 0; ``threshold`` outside
            (0, 1).

    Warns:
        UserWarning: The input is narrower than float64 and ``slope`` > 33.

    Cost: linear in the size of the batch, three exponentials an element; the targets are read once to check them,
    which on CUDA waits for the device.

    Source: the paper's approximation function and losses. Against the authors' code, github.com/doheonhan/anyloss:
    counts of a batch are divided by the batch's size, not by that of the training set; the gradient of the G-mean is
    exact, where theirs is four times as large.
    """

    def __init__(
        self,
        metric: str | Metric = "f1",
        beta: float = 1.0,
        slope: float = 73.0,
        threshold: float = 0.5,
        from_logits: bool = True,
        empty: str = "fallback",
        average: str | None = None,
        upcast: bool = True,
    ) -> None:
        super().__init__(metric, beta, threshold, from_logits, empty, average)
        check_number("slope", slope, above=0)
        self.slope = slope
        self.upcast = upcast

    def forward(
        self,
        input: Float[Tensor, "batch *classes"],  # noqa: A002 - torch's name
        target: Shaped[Tensor, "batch ..."],
        weight: Float[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, ""]:
        """Return one minus the soft metric of a batch.

        Args:
            input: Logits, or probabilities with ``from_logits=False``.
            target: Classes, 0 or 1; with ``average``, also class indices.
            weight: Weights of the samples, ≥ 0; the counts become sums of weights.

        Shape:
            ``input`` (batch,) or (batch, 1), with ``average`` (batch, classes); ``target`` the same, or (batch,);
            ``weight`` the same, or (batch,); output ().

        Returns:
            The loss, in the precision of ``input``.

        Raises:
            ValueError: Shapes do not fit; a target is not 0 or 1; a probability is outside [0, 1]; a weight is
                negative; a class is missing with ``empty="raise"``. Not checked in compiled code.
            TypeError: ``input`` is not of floating point.
        """
        return self.evaluate(input, target, weight)

    def labels(self, p: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return A(p) and 1 − A(p)."""
        return two_sided_labels(p, self.slope, self.threshold)

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float64 where a narrower type cannot hold the slope (and ``upcast``), else at least float32."""
        if dtype == torch.float64 or self.slope <= FLOAT32_SLOPE:
            return super().working_dtype(dtype)
        what = "computing in float64" if self.upcast else "soft labels round to 0 and 1"
        warnings.warn(f"slope {self.slope:g} > {FLOAT32_SLOPE:g} is too steep for {dtype}: {what}", stacklevel=6)
        return torch.float64 if self.upcast else super().working_dtype(dtype)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, slope={self.slope}"


class ScoreOrientedLoss(_MetricLoss):
    r"""One minus a metric of the expected confusion matrix, the threshold being random: SOL, a baseline.

    With F the distribution function of the threshold, the expected label of a probability p is F(p). The prior is a
    raised cosine around the threshold, or uniform on (0, 1), where F(p) = p:

    .. math::
        F(p) = \tfrac12\Big(1 + x + \tfrac1\pi \sin \pi x\Big), \qquad
        x = \min\Big(1, \max\Big(-1, \frac{p - t}{\delta}\Big)\Big)

    Args:
        metric: As in :class:`~provenn.losses.AnyLoss`.
        delta: Half the width of the raised cosine; ``None`` for the uniform prior.
        beta: β of ``metric="fbeta"``.
        threshold: Mean of the raised cosine.
        from_logits: Whether inputs are logits; else they are probabilities.
        empty: As in :class:`~provenn.losses.AnyLoss`.
        average: As in :class:`~provenn.losses.AnyLoss`.

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: An unknown ``metric``, ``empty`` or ``average``; ``beta`` < 0; ``threshold`` outside (0, 1);
            ``delta`` ≤ 0, or so large that the raised cosine reaches out of [0, 1].

    Cost: linear in the size of the batch, an exponential and a sine an element. Where \|p − t\| > δ there is no
    gradient.

    Source: Marchetti et al. 2022, the expected confusion matrix under a prior of the threshold; ``delta=0.1`` is
    what AnyLoss's authors compare with.
    """

    def __init__(
        self,
        metric: str | Metric = "f1",
        delta: float | None = 0.1,
        beta: float = 1.0,
        threshold: float = 0.5,
        from_logits: bool = True,
        empty: str = "fallback",
        average: str | None = None,
    ) -> None:
        super().__init__(metric, beta, threshold, from_logits, empty, average)
        if delta is not None:
            check_number("delta", delta, above=0, at_most=min(threshold, 1 - threshold))
        self.delta = delta

    def forward(
        self,
        input: Float[Tensor, "batch *classes"],  # noqa: A002 - torch's name
        target: Shaped[Tensor, "batch ..."],
        weight: Float[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, ""]:
        """Return one minus the expected metric of a batch.

        Args:
            input: Logits, or probabilities with ``from_logits=False``.
            target: Classes, 0 or 1; with ``average``, also class indices.
            weight: Weights of the samples, ≥ 0; the counts become sums of weights.

        Shape:
            ``input`` (batch,) or (batch, 1), with ``average`` (batch, classes); ``target`` the same, or (batch,);
            ``weight`` the same, or (batch,); output ().

        Returns:
            The loss, in the precision of ``input``.

        Raises:
            ValueError: Shapes do not fit; a target is not 0 or 1; a probability is outside [0, 1]; a weight is
                negative; a class is missing with ``empty="raise"``. Not checked in compiled code.
            TypeError: ``input`` is not of floating point.
        """
        return self.evaluate(input, target, weight)

    def labels(self, p: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return F(p) and 1 − F(p)."""
        if self.delta is None:
            return p, 1 - p
        x = ((p - self.threshold) / self.delta).clamp(-1, 1)
        rise = x + torch.sin(math.pi * x) / math.pi
        return (1 + rise) / 2, (1 - rise) / 2

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, delta={self.delta}"
