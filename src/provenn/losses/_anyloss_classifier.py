"""A scikit-learn classifier that trains the paper's perceptrons for a metric.

Source: Han, Moniz, Chawla, "AnyLoss", KDD 2024, arXiv 2405.14745, section 4 and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import predict, train
from provenn.losses._anyloss_loss import AnyLoss
from provenn.losses._anyloss_sampler import StratifiedBatchSampler

SMALLEST_BATCH = 10


class AnyLossClassifier(ClassifierMixin, BaseEstimator):
    """A binary classifier that maximises a metric: a single-layer perceptron, or one with hidden layers.

    The paper's protocol. Inputs are standardised. Without hidden layers: zero initial weights, full-batch gradient
    descent. With them: He-normal weights, batch normalisation before each layer's sigmoids, Adam on stratified
    batches.

    Args:
        metric: As in :class:`~provenn.losses.AnyLoss`.
        hidden: Units of the hidden layer, or of each of several; ``None`` for a single-layer perceptron. The paper's
            has 2.
        beta: β of ``metric="fbeta"``.
        slope: L of the loss.
        threshold: t of the loss; predicted 1 above it.
        lr: Learning rate; ``None`` for the paper's, 0.1 without hidden layers and 1e-3 with.
        epochs: Passes over the data (steps, without hidden layers); ``None`` for the paper's, 1000 and 100.
        batch_fraction: Share of the data in a batch, with hidden layers; a batch has at least 10 samples.
        random_state: Seeds initial weights and batches: an integer or a numpy ``RandomState``; ``None`` draws from
            torch's global generator.
        device: Where to train and predict; ``None`` for torch's default device.

    Attributes:
        classes_: The two classes; the second is the positive one.
        n_features_in_: Number of features seen by ``fit``.
        feature_names_in_: Their names, if they are strings.
        network_: The trained network, on standardised inputs.
        mean_: Mean of each feature.
        scale_: Standard deviation of each feature; 1 for a constant one.
        n_iter_: Number of epochs.

    Raises:
        ValueError: From ``fit``: a bad argument, or not exactly two classes.

    Cost: without hidden layers ``epochs`` products of the data with a vector, forward and back, in float64.

    Source: the paper's experiments; layers, initialisation and batch size from the authors' notebooks,
    github.com/doheonhan/anyloss.
    """

    def __init__(
        self,
        metric="f1",
        hidden=None,
        beta=1.0,
        slope=73.0,
        threshold=0.5,
        lr=None,
        epochs=None,
        batch_fraction=0.05,
        random_state=None,
        device=None,
    ):
        # No types: scikit-learn may set anything; fit checks.
        self.metric = metric
        self.hidden = hidden
        self.beta = beta
        self.slope = slope
        self.threshold = threshold
        self.lr = lr
        self.epochs = epochs
        self.batch_fraction = batch_fraction
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        """Say to scikit-learn that there are two classes."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(
        self,
        X: Shaped[np.ndarray, "samples features"] | Any,
        y: Shaped[np.ndarray, " samples"] | Any,
        sample_weight: Shaped[np.ndarray, " samples"] | Any = None,
    ) -> AnyLossClassifier:
        """Train.

        Args:
            X: Features.
            y: Classes.
            sample_weight: Weights of the samples, in the counts and in the standardisation.

        Returns:
            The classifier itself.

        Raises:
            ValueError: A bad argument, or not exactly two classes.
        """
        widths = self._checked()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2 or len(np.unique(encoded[weights > 0])) < 2:
            raise ValueError(f"y must hold two classes, got 1 class with any weight among {self.classes_.tolist()}")
        self.mean_, self.scale_ = _moments(X, weights)
        device = torch.get_default_device() if self.device is None else torch.device(self.device)
        data = tuple(torch.from_numpy(one).to(device) for one in (self._standardised(X), encoded, weights))
        seed = _seed(self.random_state)
        with seeded(seed, "weights"):
            self.network_ = _network(X.shape[1], widths).to(device=device, dtype=torch.float64)
        self.n_iter_ = self._train(data, seed)
        return self

    def _checked(self) -> tuple[int, ...]:
        """Check the arguments and return the widths of the hidden layers."""
        hidden = () if self.hidden is None else self.hidden
        widths = (hidden,) if isinstance(hidden, Integral) else tuple(hidden)
        for width in widths:
            check_integer("hidden", _plain(width), at_least=1)
        if self.lr is not None:
            check_number("lr", self.lr, above=0)
        if self.epochs is not None:
            check_integer("epochs", _plain(self.epochs), at_least=1)
        check_number("batch_fraction", self.batch_fraction, above=0, at_most=1)
        return tuple(map(int, widths))

    def _train(self, data: tuple[Tensor, ...], seed: int) -> int:
        deep = len(self.network_) > 1
        criterion = AnyLoss(self.metric, self.beta, self.slope, self.threshold)
        lr = self.lr or (1e-3 if deep else 0.1)
        epochs = int(self.epochs or (100 if deep else 1000))
        parameters = self.network_.parameters()
        optimizer = torch.optim.Adam(parameters, lr) if deep else torch.optim.SGD(parameters, lr)
        size = max(SMALLEST_BATCH, math.ceil(self.batch_fraction * len(data[0])))
        sampler = StratifiedBatchSampler(data[1], size, generator(seed, "batches"))

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            if not deep:
                yield data
                return
            for batch in sampler:
                yield tuple(one[batch] for one in data)

        def loss(network: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return criterion(network(x), y, weight)

        for _ in train(self.network_, optimizer, batches, loss, epochs=epochs):
            pass
        self.network_.eval()
        return epochs

    def _standardised(self, X: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples features"]:
        return (X - self.mean_) / self.scale_

    def decision_function(self, X: Any) -> Float[np.ndarray, " samples"]:
        """Return the logit minus that of the threshold: positive where the second class is predicted.

        Args:
            X: Features.

        Shape:
            ``X`` (samples, features); output (samples,).
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        device = next(self.network_.parameters()).device
        logits = predict(self.network_, torch.from_numpy(self._standardised(X)).to(device))
        return logits[:, 0].cpu().numpy() - math.log(self.threshold / (1 - self.threshold))

    def predict_proba(self, X: Any) -> Float[np.ndarray, "samples 2"]:
        """Return the network's probabilities of the two classes; trained for a metric, they are not calibrated.

        Args:
            X: Features.

        Shape:
            ``X`` (samples, features); output (samples, 2).
        """
        logits = torch.from_numpy(self.decision_function(X)) + math.log(self.threshold / (1 - self.threshold))
        return torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1).numpy()

    def predict(self, X: Any) -> Shaped[np.ndarray, " samples"]:
        """Return the class of each sample: the second where its probability is above the threshold.

        Args:
            X: Features.

        Shape:
            ``X`` (samples, features); output (samples,).
        """
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


def _plain(value: Any) -> Any:
    """Return numpy's integers, as searches over parameters give them, as Python's."""
    return int(value) if isinstance(value, np.integer) else value


def _seed(random_state: Any) -> int:
    if random_state is None:
        return int(torch.randint(2**31 - 1, ()))
    return int(check_random_state(random_state).randint(2**31 - 1))


def _moments(X: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = np.average(X, axis=0, weights=weights)
    scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
    constant = scale <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return mean, np.where(constant, 1.0, scale)


def _network(features: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        linear = nn.Linear(features, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # He's, whatever the activation, as the authors'
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.BatchNorm1d(width), nn.Sigmoid()]
        features = width
    last = nn.Linear(features, 1)
    (nn.init.xavier_uniform_ if widths else nn.init.zeros_)(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
