"""Class statistics, batch by batch, against NumPy over all the data at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.experiment.class_statistics import ClassStatistics


def all_at_once(features, labels, classes):
    """Counts, means and scatter by their definitions."""
    counts = np.array([(labels == k).sum() for k in range(classes)], dtype=float)
    means = np.zeros((classes, features.shape[1]))
    scatter = np.zeros((features.shape[1],) * 2)
    for k in range(classes):
        mine = features[labels == k]
        if len(mine):
            means[k] = mine.mean(0)
            scatter += (mine - means[k]).T @ (mine - means[k])
    return counts, means, scatter


def in_batches(features, labels, classes, cuts=(), dtype=torch.float64):
    statistics = ClassStatistics(classes, features.shape[1])
    for x, y in zip(np.split(features, cuts), np.split(labels, cuts), strict=True):
        statistics.update(torch.from_numpy(x).to(dtype), torch.from_numpy(y))
    return statistics


@given(
    st.integers(0, 25), st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 25), max_size=6), st.integers(0)
)
def test_any_split_into_batches(count, classes, width, cuts, seed):
    draws = np.random.default_rng(seed)
    features = draws.normal(3, 2, size=(count, width))
    labels = draws.integers(0, classes, size=count)
    got = in_batches(features, labels, classes, sorted(min(cut, count) for cut in cuts))
    counts, means, scatter = all_at_once(features, labels, classes)
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_allclose(got.means, means, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got.scatter, scatter, rtol=1e-11, atol=1e-11)
    if count:
        np.testing.assert_allclose(got.mean, features.mean(0), rtol=1e-12, atol=1e-13)
    else:
        assert torch.isnan(got.mean).all()


@pytest.mark.parametrize("cuts", [(), (1,), range(5, 600, 5), range(1, 600)])
def test_small_scatter_around_huge_means(cuts):
    """Sums of squares would leave no digit of a scatter 22 orders below them."""
    draws = np.random.default_rng(0)
    noise = np.round(draws.normal(0, 1e-3, size=(600, 3)) * 2**20) / 2**20  # exact beside 1e8 in float64
    labels = draws.integers(0, 3, size=600)
    offsets = np.array([1e8, -1e8, 3e8])[labels][:, None]
    got = in_batches(noise + offsets, labels, 3, list(cuts))
    _, means, scatter = all_at_once(noise, labels, 3)
    # The means themselves are rounded to 6e-8 beside 3e8, which is 6e-5 of a standard deviation.
    np.testing.assert_allclose(got.scatter, scatter, rtol=2e-5, atol=1e-5 * np.trace(scatter))
    np.testing.assert_allclose(got.means.numpy() - np.array([[1e8], [-1e8], [3e8]]), means, atol=1e-6)


def test_scatter_stays_symmetric_and_positive():
    draws = np.random.default_rng(1)
    got = in_batches(draws.normal(size=(50, 4)), draws.integers(0, 2, size=50), 2, range(3, 50, 3))
    torch.testing.assert_close(got.scatter, got.scatter.T, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(got.scatter).min() > 0


def test_a_class_without_samples():
    got = in_batches(np.array([[1.0], [3.0], [7.0]]), np.array([0, 2, 0]), 4, (1, 2))
    assert got.counts.tolist() == [2, 0, 1, 0]
    assert got.means.flatten().tolist() == [4, 0, 3, 0]
    assert got.scatter.item() == 18
    assert got.mean.item() == pytest.approx(11 / 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    statistics = ClassStatistics(2, 1)
    statistics.update(torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([0, 1, 0], dtype=dtype))
    assert statistics.means.flatten().tolist() == [3.5, 2.0]
    assert statistics.scatter.item() == 12.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_float64(dtype):
    draws = np.random.default_rng(2)
    features = torch.from_numpy(draws.normal(100, 1, size=(400, 2))).to(dtype)
    labels = draws.integers(0, 2, size=400)
    got = in_batches(features.double().numpy(), labels, 2, range(7, 400, 7), dtype)
    _, _, scatter = all_at_once(features.double().numpy(), labels, 2)
    np.testing.assert_allclose(got.scatter, scatter, rtol=1e-11)
    assert got.means.dtype == got.scatter.dtype == got.counts.dtype == torch.float64


def test_no_graph_is_kept_and_the_input_is_left():
    statistics = ClassStatistics(1, 2)
    features = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    statistics.update(features * 1, torch.zeros(3, dtype=torch.long))
    assert not statistics.scatter.requires_grad
    assert not statistics.means.requires_grad
    assert torch.equal(features, torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.zeros(2, 3), [0, 2], r"labels must be in 0 … 1, got 0 … 2"),
        (torch.zeros(2, 3), [-1, 0], r"labels must be in 0 … 1, got -1 … 0"),
        (torch.zeros(2, 4), [0, 1], r"features .*\(2, 3\).*\(2, 4\)"),
        (torch.zeros(3, 3), [0, 1], r"features .*\(2, 3\).*\(3, 3\)"),
    ],
)
def test_bad_batches_leave_the_sums(features, labels, words):
    statistics = ClassStatistics(2, 3)
    with pytest.raises(ValueError, match=words):
        statistics.update(features, torch.tensor(labels))
    assert statistics.counts.sum() == 0


@pytest.mark.parametrize(("classes", "features", "word"), [(0, 1, "classes"), (1, 0, "features")])
def test_bad_sizes(classes, features, word):
    with pytest.raises(ValueError, match=f"{word} .*0"):
        ClassStatistics(classes, features)
