"""Toys: splits, shifts, noise and cuts against counts and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from provenn.data.toys import (
    geometric_counts,
    imbalanced_subset,
    imbalanced_table,
    noisy_digits,
    shift_and_noise,
    stratified_permutation,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_digits_are_split_completely_and_by_class() -> None:
    digits = noisy_digits(shift=0, sigma=0)
    parts = [
        (digits.x_train, digits.y_train, 1000),
        (digits.x_validation, digits.y_validation, 300),
        (digits.x_test, digits.y_test, 497),
    ]
    pixels, classes = load_digits(return_X_y=True)
    whole = np.bincount(classes)
    for x, y, size in parts:
        assert x.shape == (size, 1, 8, 8)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        share = torch.bincount(y, minlength=10).numpy()
        # The middle part is cut at both ends, so it may be one off at each.
        assert np.abs(share - whole * size / 1797).max() <= 2
    rows = {
        (*image.flatten().mul(16).round().int().tolist(), int(label))
        for x, y, _ in parts
        for image, label in zip(x, y, strict=True)
    }
    assert rows == {(*row.astype(int).tolist(), int(label)) for row, label in zip(pixels, classes, strict=True)}
    assert sum(len(y) for _, y, _ in parts) == 1797
    assert digits.x_train.min() == 0
    assert digits.x_train.max() == 1


def test_the_default_task_is_always_the_same_and_a_generator_changes_it() -> None:
    first, second, other = noisy_digits(), noisy_digits(), noisy_digits(generator=seeded(1))
    assert torch.equal(first.x_test, second.x_test)
    assert torch.equal(first.x_train, second.x_train)
    assert not torch.equal(first.y_test, other.y_test)


def test_only_validation_and_test_images_are_disturbed() -> None:
    noisy, clean = noisy_digits(), noisy_digits(shift=0, sigma=0)
    assert torch.equal(noisy.x_train, clean.x_train)
    assert torch.equal(noisy.y_test, clean.y_test)
    still = noisy_digits(shift=0)
    for name in ("x_validation", "x_test"):
        noise = getattr(still, name) - getattr(clean, name)
        # 497 × 64 draws: the standard error of the standard deviation is below 0.0013.
        assert noise.std().item() == pytest.approx(0.25, abs=0.006)
        assert noise.mean().item() == pytest.approx(0, abs=0.008)
        assert not torch.equal(getattr(noisy, name), getattr(still, name))


def test_every_shift_is_a_plain_move_and_all_nine_occur_equally() -> None:
    image = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    moves = {}
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = torch.zeros_like(image)
            for i in range(4):
                for j in range(4):
                    if 0 <= i - down < 4 and 0 <= j - right < 4:
                        moved[0, :, i, j] = image[0, :, i - down, j - right]
            moves[(down, right)] = moved
    draws = shift_and_noise(image.expand(9000, -1, -1, -1), seeded(), shift=1, sigma=0)
    counts = [(draws == move).all(dim=(1, 2, 3)).sum().item() for move in moves.values()]
    assert sum(counts) == 9000
    # 1000 expected, standard deviation 30; four of them.
    assert min(counts) > 880
    assert max(counts) < 1120


def test_shift_and_noise_draws_per_image_leaves_its_input_and_global_state() -> None:
    images = torch.zeros(50, 3, 5, 6)
    state = torch.random.get_rng_state()
    out = shift_and_noise(images, seeded(), shift=2, sigma=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not images.any()
    assert out.shape == images.shape
    assert len({tuple(row.flatten().tolist()) for row in out}) == 50
    assert torch.equal(out, shift_and_noise(images, seeded(), shift=2, sigma=1.0))
    assert shift_and_noise(images[:0], seeded()).shape == (0, 3, 5, 6)
    assert shift_and_noise(images.double(), seeded()).dtype == torch.float64


def test_a_stratified_order_is_random_within_classes() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_permutation(labels, seeded())
    assert sorted(order.tolist()) == list(range(100))
    for cut in range(1, 100):
        share = torch.bincount(labels[order[:cut]], minlength=3)
        assert (share - torch.tensor([0.6, 0.3, 0.1]) * cut).abs().max() <= 1
    assert order[labels[order] == 0].tolist() != list(range(60))
    assert not torch.equal(order, stratified_permutation(labels, seeded(1)))


def test_an_imbalanced_table_has_the_asked_shape_and_share() -> None:
    x, y = imbalanced_table(np.random.default_rng(0), positives=0.03, flips=0)
    assert x.shape == (2000, 10)
    assert y.sum() == 60
    _, flipped = imbalanced_table(np.random.default_rng(0), positives=0.03, flips=0.5)
    # Half the labels are drawn anew with even odds: 0.03 / 2 + 0.25 of 2000, standard deviation 16.
    assert flipped.sum() == pytest.approx(530, abs=80)


def test_separation_and_informative_columns_tell_the_classes_apart() -> None:
    gap = {}
    for separation in (0.5, 5.0):
        x, y = imbalanced_table(
            np.random.default_rng(1), positives=0.5, separation=separation, flips=0, features=6, informative=2
        )
        gap[separation] = np.linalg.norm(x[y == 1], axis=1).mean()
    assert gap[5.0] > 1.5 * gap[0.5]
    first, _ = imbalanced_table(np.random.default_rng(2))
    again, _ = imbalanced_table(np.random.default_rng(2))
    other, _ = imbalanced_table(np.random.default_rng(3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_subset_keeps_the_asked_counts_in_order() -> None:
    y = torch.arange(100) % 4
    x = torch.arange(100).float().reshape(100, 1)
    kept_x, kept_y = imbalanced_subset(x, y, {0: 5, 2: 0, 3: 25}, seeded())
    assert torch.bincount(kept_y, minlength=4).tolist() == [5, 25, 0, 25]
    assert kept_x.flatten().tolist() == sorted(kept_x.flatten().tolist())
    assert torch.equal(kept_x.flatten().long() % 4, kept_y)
    assert len(set(kept_x.flatten().tolist())) == 55
    other_x, _ = imbalanced_subset(x, y, {0: 5, 2: 0, 3: 25}, seeded(1))
    assert not torch.equal(kept_x, other_x)
    by_class, _ = imbalanced_subset(x, y, [1, 2, 3, 4], seeded())
    assert len(by_class) == 10
    with pytest.raises(ValueError, match=r"counts\[1\].*26"):
        imbalanced_subset(x, y, {1: 26}, seeded())


def test_geometric_counts_keep_their_ratio() -> None:
    counts = geometric_counts(150, 15, 10)
    assert counts[0] == 150
    assert counts[-1] == 15
    assert counts == [round(150 * 0.1 ** (i / 9)) for i in range(10)]
    with pytest.raises(ValueError, match="smallest"):
        geometric_counts(5, 6, 3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: noisy_digits(1000, 797), "train"),
        (lambda: noisy_digits(0), "train"),
        (lambda: noisy_digits(sigma=-1.0), "sigma"),
        (lambda: shift_and_noise(torch.zeros(1, 1, 2, 2), seeded(), shift=-1), "shift"),
        (lambda: imbalanced_table(np.random.default_rng(0), positives=0.0), "positives"),
        (lambda: imbalanced_table(np.random.default_rng(0), informative=11), "informative"),
        (lambda: imbalanced_table(np.random.default_rng(0), flips=1.5), "flips"),
    ],
)
def test_bad_arguments_are_named(call, name) -> None:
    with pytest.raises(ValueError, match=name):
        call()
