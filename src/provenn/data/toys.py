"""Small simulated tasks for claims and tests: noisy digits, imbalanced tables and imbalanced cuts.

Everything is drawn from the generator that is passed; the global generators are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.datasets import load_digits, make_classification
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number

DIGITS = 1797


@dataclass(frozen=True)
class NoisyDigits:
    """Digits split in three: clean training images, and validation and test images with their noise drawn once.

    Shape: images (N, 1, 8, 8) float32, labels (N,) int64.
    """

    x_train: Float[Tensor, "train 1 8 8"]
    y_train: Int[Tensor, " train"]
    x_validation: Float[Tensor, "validation 1 8 8"]
    y_validation: Int[Tensor, " validation"]
    x_test: Float[Tensor, "test 1 8 8"]
    y_test: Int[Tensor, " test"]


def noisy_digits(
    train: int = 1000,
    validation: int = 300,
    *,
    shift: int = 1,
    sigma: float = 0.25,
    generator: torch.Generator | None = None,
) -> NoisyDigits:
    """Split scikit-learn's 1797 digits, class by class, and disturb the validation and test images once.

    Training images stay clean, scaled to [0, 1]: draw their noise afresh every epoch with :func:`shift_and_noise`.

    Args:
        train: Number of training images.
        validation: Number of validation images; what is left (497 by default) is the test set.
        shift: Largest shift of a validation or test image, in pixels.
        sigma: Standard deviation of their noise.
        generator: Draws split and noise. Without one, a generator seeded with 0, so that every caller gets the
            same task.

    Raises:
        ValueError: No image is left for the test set, or a size or ``sigma`` is negative.
    """
    check_integer("train", train, at_least=1)
    check_integer("validation", validation, at_least=0, at_most=DIGITS - 1)
    if train + validation >= DIGITS:
        raise ValueError(f"train + validation must be < {DIGITS}, got {train} + {validation}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(classes).to(torch.int64)
    order = stratified_permutation(labels, generator)
    cuts = torch.split(order, [train, validation, DIGITS - train - validation])
    parts = [cut[torch.randperm(len(cut), generator=generator, device=generator.device)] for cut in cuts]
    (x_train, y_train), (x_validation, y_validation), (x_test, y_test) = (
        (images[part], labels[part]) for part in parts
    )
    return NoisyDigits(
        x_train,
        y_train,
        shift_and_noise(x_validation, generator, shift, sigma),
        y_validation,
        shift_and_noise(x_test, generator, shift, sigma),
        y_test,
    )


def shift_and_noise(
    images: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    shift: int = 1,
    sigma: float = 0.25,
) -> Float[Tensor, "batch channels height width"]:
    """Shift every image by its own random whole number of pixels (zeros move in) and add Gaussian noise.

    Args:
        images: Images on any device; the draws come from the generator's own, so they are the same everywhere.
        generator: Source of the draws.
        shift: Largest shift in each direction, in pixels; both directions are uniform in −shift … shift.
        sigma: Standard deviation of the noise, in the images' unit.

    Returns:
        New images; values are not clipped.

    Raises:
        ValueError: ``shift`` or ``sigma`` is negative.
    """
    check_integer("shift", shift, at_least=0)
    check_number("sigma", sigma, at_least=0)
    batch, channels, height, width = images.shape
    where, device = generator.device, images.device
    offset = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator, device=where).to(device)
    rows = torch.arange(height, device=device) + offset[0]
    columns = torch.arange(width, device=device) + offset[1]
    padded = torch.nn.functional.pad(images, (shift, shift, shift, shift))
    moved = padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=where).to(device)
    return moved + sigma * noise


def stratified_permutation(labels: Int[Tensor, " samples"], generator: torch.Generator) -> Int[Tensor, " samples"]:
    """Return a random order in which every stretch holds the classes in proportion.

    Cut anywhere, each piece has, of every class, its proportional share to within one sample a cut.

    Args:
        labels: The classes.
        generator: Source of the draws, on the labels' device.
    """
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    order = order[torch.argsort(labels[order], stable=True)]
    _, sizes = torch.unique(labels, return_counts=True)
    place = torch.cat([(torch.arange(size, device=labels.device) + 0.5) / size for size in sizes.tolist()])
    return order[torch.argsort(place, stable=True)]


def imbalanced_table(
    generator: np.random.Generator,
    *,
    samples: int = 2000,
    features: int = 10,
    informative: int = 4,
    positives: float = 0.05,
    separation: float = 1.0,
    flips: float = 0.02,
) -> tuple[Float[np.ndarray, "samples features"], Int[np.ndarray, " samples"]]:
    """Simulate a binary problem with few positives; features beyond the informative ones are noise.

    Args:
        generator: Source of the draws.
        samples: Number of rows.
        features: Number of columns.
        informative: Number of columns that bear on the class, at least 2.
        positives: Share of class 1 before labels are flipped.
        separation: ``class_sep`` of scikit-learn: half the side of the cube whose corners the clusters sit on.
        flips: Share of labels drawn anew with even odds (so half as many change).

    Returns:
        The table, float64, and the labels, int64, 1 for the rare class.

    Raises:
        ValueError: A share is outside its range, or there are more informative columns than columns.

    Source: Guyon, "Design of experiments for the NIPS 2003 variable selection benchmark" (2003).
    """
    check_integer("informative", informative, at_least=2, at_most=features)
    check_number("positives", positives, above=0, below=1)
    check_number("flips", flips, at_least=0, at_most=1)
    table, labels = make_classification(
        n_samples=samples,
        n_features=features,
        n_informative=informative,
        n_redundant=0,
        weights=[1 - positives],
        class_sep=separation,
        flip_y=flips,
        random_state=int(generator.integers(2**32)),
    )
    return table, labels.astype(np.int64)


def imbalanced_subset(
    x: Shaped[Tensor, "samples ..."],
    y: Int[Tensor, " samples"],
    counts: Mapping[int, int] | Sequence[int],
    generator: torch.Generator,
) -> tuple[Shaped[Tensor, "kept ..."], Int[Tensor, " kept"]]:
    """Cut classes down to given numbers of samples, drawn without replacement.

    Args:
        x: Samples.
        y: Their classes.
        counts: How many to keep of each class: a sequence by class, or a mapping; classes it leaves out stay whole.
        generator: Source of the draws, on the labels' device.

    Returns:
        The kept samples and classes, in their old order.

    Raises:
        ValueError: A class has fewer samples than are to be kept.
    """
    wanted = dict(counts) if isinstance(counts, Mapping) else dict(enumerate(counts))
    keep = torch.ones_like(y, dtype=torch.bool)
    for label, count in wanted.items():
        members = torch.nonzero(y == label).flatten()
        check_integer(f"counts[{label}]", count, at_least=0, at_most=len(members))
        keep[members[torch.randperm(len(members), generator=generator, device=y.device)[count:]]] = False
    return x[keep], y[keep]


def geometric_counts(largest: int, smallest: int, classes: int) -> list[int]:
    """Return class sizes that fall geometrically, rounded: ``geometric_counts(150, 15, 10)`` is 150, 116, … 15.

    Args:
        largest: Size of the first class.
        smallest: Size of the last.
        classes: Number of classes, at least 2.

    Raises:
        ValueError: ``smallest`` is not between 1 and ``largest``, or there are fewer than 2 classes.
    """
    check_integer("classes", classes, at_least=2)
    check_integer("largest", largest, at_least=1)
    check_integer("smallest", smallest, at_least=1, at_most=largest)
    return [round(size) for size in np.geomspace(largest, smallest, classes).tolist()]
