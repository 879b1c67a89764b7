"""Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.

Dang, Tran, Osher, Tran-The, Ho, Nguyen, ICML 2023. https://arxiv.org/abs/2301.00437

How far a classifier has gone towards collapse at each layer of a linear head, and the exact geometry that it goes to:
features at their class means, class means and rows of every partial product W_M⋯W_j in one frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.experiment.class_statistics import ClassStatistics
from provenn.core.experiment.recording import evaluating, recorded_inputs
from provenn.core.experiment.reports import Report
from provenn.inspect._neural_collapse_solution import CollapseSolution, Loss, check_problem, collapse_solution

__all__ = ["NeuralCollapse", "UnconstrainedFeatures", "collapse_solution", "neural_collapse_metrics"]

_CHUNK = 4096
"""Samples that are worked on in float64 at once."""

Frame = Literal["etf", "of"]
Target = Frame | Tensor | Mapping[str, Tensor]


def neural_collapse_metrics(
    features: Float[Tensor, "samples features"],
    labels: Int[Tensor, " samples"],
    weight: Float[Tensor, "classes features"],
    target: Target = "etf",
) -> dict[str, Any]:
    r"""Measure how far features and a linear classifier are from neural collapse.

    With class means H̄, within- and between-class covariances Σ_W, Σ_B, and ‖·‖ the Frobenius norm:

    - NC1 = tr(Σ_W Σ_B⁺)/K: features at their class means;
    - NC2 = ‖A/‖A‖ − T/‖T‖‖ for A = H̄ᵀH̄ (``nc2``) and for A = W Wᵀ (``nc2_weight``): means and rows form the frame T;
    - NC3 = ‖B/‖B‖ − T/‖T‖‖ for B = W H̄: rows are aligned with means.

    Args:
        features: Inputs of the classifier.
        labels: Their classes, 0 … K − 1.
        weight: The classifier, or a partial product W_M⋯W_j.
        target: The frame T: ``"etf"``, a simplex equiangular tight frame I − 11ᵀ/K of means with the global mean
            removed; ``"of"``, an orthogonal frame I of means as they are; a (K, K) matrix for all three; or a mapping
            with a matrix for each of ``"features"``, ``"weight"`` and ``"product"``, as
            :meth:`CollapseSolution.targets` gives. Matrices are compared with means as they are.

    Shape:
        ``features`` (N, d), ``labels`` (N,), ``weight`` (K, d).

    Returns:
        ``nc1``, ``nc2``, ``nc2_weight``, ``nc3``; ``feature_norms`` and ``row_norms``, a tuple of K; and
        ``feature_cosine`` and ``weight_cosine``, the largest magnitude of a cosine between two different class means
        or rows (zero vectors left out).

    Raises:
        ValueError: A class has fewer than 2 samples, a label is out of range, the shapes do not fit, or the target is
            unknown.

    Cost: O(N d² + d³) time, O(d² + K d) memory beyond the features.

    Source: equations of NC1 to NC3 in the paper's experiments; NC1 as in Papyan, Han & Donoho, PNAS 117 (2020).
    """
    if features.shape[-1] != weight.shape[-1] or len(features) != len(labels):
        raise ValueError(
            f"features {tuple(features.shape)} do not fit labels {tuple(labels.shape)} and weight {tuple(weight.shape)}"
        )
    statistics = ClassStatistics(len(weight), features.shape[-1], features.device)
    for some, of_class in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        statistics.update(some, of_class)
    return _metrics(statistics, weight, target)


def _metrics(statistics: ClassStatistics, weight: Tensor, target: Target) -> dict[str, Any]:
    few = [label for label, count in enumerate(statistics.counts.tolist()) if count < 2]
    if few:
        raise ValueError(f"labels: class {few[0]} has fewer than 2 samples, which NC1 needs")
    frames = _frames(target, len(weight), statistics.means.device)
    weight = weight.detach().double().to(statistics.means.device)
    means = statistics.means - statistics.mean if _centred(target) else statistics.means
    return {
        "nc1": _within_over_between(statistics),
        "nc2": _apart(means @ means.T, frames["features"]),
        "nc2_weight": _apart(weight @ weight.T, frames["weight"]),
        "nc3": _apart(weight @ means.T, frames["product"]),
        "feature_norms": tuple(means.norm(dim=1).tolist()),
        "row_norms": tuple(weight.norm(dim=1).tolist()),
        "feature_cosine": _largest_cosine(means),
        "weight_cosine": _largest_cosine(weight),
    }


def _centred(target: Target) -> bool:
    return isinstance(target, str) and target == "etf"


def _frames(target: Target, classes: int, device: torch.device) -> dict[str, Tensor]:
    if isinstance(target, Mapping):
        named = {name: target[name].double().to(device) for name in ("features", "weight", "product")}
    else:
        if isinstance(target, str):
            check_choice("target", target, ("etf", "of"))
            frame = torch.eye(classes, dtype=torch.float64, device=device)
            if target == "etf":
                frame = frame - 1 / classes
        else:
            frame = target.double().to(device)
        named = dict.fromkeys(("features", "weight", "product"), frame)
    for name, frame in named.items():
        if frame.shape != (classes, classes):
            raise ValueError(f"target ({name}) must be {classes} × {classes}, got {tuple(frame.shape)}")
    return named


def _within_over_between(statistics: ClassStatistics) -> float:
    classes = len(statistics.counts)
    within = statistics.scatter / statistics.counts.sum()
    centred = statistics.means - statistics.mean
    # Σ_B = MᵀM/K has rank K − 1 at most; what rounding leaves beyond it must not be inverted.
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = scales > scales.max().clamp(min=torch.finfo(torch.float64).tiny) * 1e-10
    kept[classes - 1 :] = False
    directions, variances = directions[kept], scales[kept] ** 2 / classes
    if len(variances) == 0:
        return float("inf")
    return (((directions @ within) * directions).sum(1) / variances).sum().item() / classes


def _apart(matrix: Tensor, frame: Tensor) -> float:
    tiny = torch.finfo(torch.float64).tiny
    return (matrix / matrix.norm().clamp(min=tiny) - frame / frame.norm().clamp(min=tiny)).norm().item()


def _largest_cosine(rows: Tensor) -> float:
    norms = rows.norm(dim=1)
    alive = rows[norms > 1e-9 * norms.max()]
    unit = alive / alive.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(0).abs()
    return cosines.max().item() if len(alive) else 0.0


@dataclass(frozen=True)
class LayerCollapse(Report):
    """The metrics of :func:`neural_collapse_metrics` at one layer: its inputs, and the product from it to the end."""

    name: str
    nc1: float
    nc2: float
    nc2_weight: float
    nc3: float
    feature_norms: tuple[float, ...]
    row_norms: tuple[float, ...]
    feature_cosine: float
    weight_cosine: float


@dataclass(frozen=True)
class CollapseReport(Report):
    """Collapse at every linear layer of the head, from the first to the last."""

    counts: tuple[int, ...]
    target: str
    layers: tuple[LayerCollapse, ...]
    nested: ClassVar[dict[str, type[Report]]] = {"layers": LayerCollapse}

    def plot(self) -> Figure:
        """Draw NC1 to NC3 by layer on a logarithmic scale, and the norms by class."""
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        metrics, norms = figure.subplots(1, 2)
        names = [layer.name for layer in self.layers]
        for metric in ("nc1", "nc2", "nc2_weight", "nc3"):
            metrics.semilogy(names, [getattr(layer, metric) for layer in self.layers], "o-", label=metric)
        metrics.set(xlabel="layer", ylabel=f"distance to the frame ({self.target})")
        metrics.legend()
        last = self.layers[-1]
        norms.plot(last.row_norms, "o-", label="row of the last layer")
        norms.plot(last.feature_norms, "s--", label="class mean")
        norms.set(xlabel="class", ylabel="norm")
        norms.legend()
        return figure


class NeuralCollapse:
    """Measure neural collapse at every linear layer of a classifier's head.

    Args:
        layers: Names of the linear layers of the head, first to last, each feeding the next; ``None``: the
            ``nn.Linear`` modules that end the model, with nothing but dropout and identities between them.
        target: The frame to compare with: ``"etf"``, ``"of"``, a :class:`CollapseSolution`, which has its own frame at
            each layer, or ``"auto"``: an ETF if the last layer has a bias, else an orthogonal frame.
        every: Look at one batch in so many.

    Raises:
        ValueError: ``target`` is unknown, or ``every`` < 1.

    Cost: one pass over the data in evaluation mode; O(K d + d²) memory a layer, whatever the number of samples.

    Source: the paper's experiments; every partial product W_M⋯W_j is measured, not the last layer alone.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        target: Literal["auto", "etf", "of"] | CollapseSolution = "auto",
        every: int = 1,
    ) -> None:
        if not isinstance(target, CollapseSolution):
            check_choice("target", target, ("auto", "etf", "of"))
        check_integer("every", every, at_least=1)
        self.layers = layers
        self.target = target
        self.every = every

    def __call__(self, model: nn.Module, loader: Iterable[Sequence[Tensor]]) -> CollapseReport:
        """Run the model over the data once.

        Args:
            model: A classifier that ends in linear layers. Its mode, hooks and gradients are left as they are.
            loader: Yields (inputs, labels).

        Returns:
            The report.

        Raises:
            ValueError: No linear layer ends the model, a named layer is not an ``nn.Linear``, a class has fewer than 2
                samples, a label is out of range, or a solution is for another number of layers.
        """
        head = self._head(model)
        classes = list(head.values())[-1].out_features
        device = next(model.parameters()).device
        statistics = {name: ClassStatistics(classes, layer.in_features, device=device) for name, layer in head.items()}
        with evaluating(model), recorded_inputs(head) as held:
            for inputs, labels in islice(loader, 0, None, self.every):
                model(inputs.to(device))
                for name, one in statistics.items():
                    one.update(held[name], labels.to(device))
        layers = []
        product = torch.eye(classes, dtype=torch.float64, device=device)
        for place, (name, layer) in reversed(list(enumerate(head.items(), 1))):
            product = product @ layer.weight.detach().double()
            metrics = _metrics(statistics[name], product, self._target_at(place, head))
            layers.append(LayerCollapse(name=name, **metrics))
        counts = tuple(int(count) for count in statistics[name].counts.tolist())
        return CollapseReport(counts, self._target_name(head), tuple(reversed(layers)))

    def _head(self, model: nn.Module) -> dict[str, nn.Linear]:
        modules = dict(model.named_modules())
        if self.layers is not None:
            for name in self.layers:
                if not isinstance(modules.get(name), nn.Linear):
                    raise ValueError(f"layers names {name!r}, which is not an nn.Linear of the model")
            return {name: modules[name] for name in self.layers}  # type: ignore[misc]
        found: dict[str, nn.Linear] = {}
        leaves = [(name, module) for name, module in modules.items() if not list(module.children())]
        for name, module in reversed(leaves):
            if isinstance(module, nn.Linear):
                found = {name: module, **found}
            elif not isinstance(module, (nn.Identity, nn.Dropout)):
                break
        if not found:
            raise ValueError(f"model {type(model).__name__} does not end in an nn.Linear; name the head's with layers=")
        return found

    def _target_name(self, head: Mapping[str, nn.Linear]) -> str:
        if isinstance(self.target, CollapseSolution):
            return "predicted"
        if self.target == "auto":
            return "etf" if list(head.values())[-1].bias is not None else "of"
        return self.target

    def _target_at(self, place: int, head: Mapping[str, nn.Linear]) -> Target:
        if not isinstance(self.target, CollapseSolution):
            return "etf" if self._target_name(head) == "etf" else "of"
        if len(self.target.dims) != len(head):
            raise ValueError(f"target is a solution of {len(self.target.dims)} layers, the head has {len(head)}")
        return self.target.targets(place)


class UnconstrainedFeatures(nn.Module):
    r"""A deep linear network over features that are free parameters: the model that the theory solves.

    .. math::
        \tfrac{1}{2N} \lVert W_M \cdots W_1 H_1 + b 1^\top - Y \rVert_F^2
        + \sum_j \tfrac{\lambda_{W_j}}{2} \lVert W_j \rVert_F^2 + \tfrac{\lambda_H}{2} \lVert H_1 \rVert_F^2

    Args:
        counts: Samples of each class, n_1 … n_K.
        dims: Width of the features, then of every hidden layer: (d_1, …, d_M) for M linear layers.
        loss: ``"mse"``, or ``"ce"`` for mean cross-entropy in place of the first term.
        lambdas: λ_H, λ_{W_1}, …, λ_{W_M}.
        bias: Whether the last layer has a bias, which is not regularised. Cross-entropy needs one.

    Shape:
        ``features`` (N, d_1), rows sorted by class; ``weights[j]`` (d_{j+2}, d_{j+1}), the last (K, d_M). ``forward()``
        takes nothing and returns the outputs (N, K).

    Raises:
        ValueError: As :func:`collapse_solution`.

    Cost: O(N d K + d² Σ dims) time a step; N d_1 parameters of features.

    Source: the paper's problem statement (unconstrained features model).
    """

    labels: Tensor

    def __init__(
        self,
        counts: Sequence[int],
        dims: Sequence[int],
        loss: Loss = "mse",
        lambdas: Sequence[float] = (1e-3, 1e-3),
        bias: bool = False,
    ) -> None:
        check_problem(counts, dims, lambdas, loss, bias)
        super().__init__()
        widths = [*dims, len(counts)]
        self.loss = loss
        self.lambdas = tuple(lambdas)
        self.features = nn.Parameter(torch.randn(sum(counts), dims[0]))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(wide, narrow) / narrow**0.5) for narrow, wide in pairwise(widths)
        )
        self.bias = nn.Parameter(torch.zeros(len(counts))) if bias else None
        labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
        self.register_buffer("labels", labels)

    def forward(self) -> Float[Tensor, "samples classes"]:
        """Run the network on every free feature.

        Returns:
            The outputs, (N, K).
        """
        outputs: Tensor = self.features
        for weight in self.weights:
            outputs = outputs @ weight.T
        return outputs if self.bias is None else outputs + self.bias

    def objective(self) -> Float[Tensor, ""]:
        """Compute the regularised loss.

        Returns:
            A scalar, with gradients.
        """
        outputs = self()
        if self.loss == "ce":
            fit = nn.functional.cross_entropy(outputs, self.labels)
        else:
            fit = (outputs - nn.functional.one_hot(self.labels, outputs.shape[1])).square().sum() / (2 * len(outputs))
        factors = (self.features, *self.weights)
        penalty = sum(
            strength / 2 * factor.square().sum() for strength, factor in zip(self.lambdas, factors, strict=True)
        )
        return fit + penalty
