"""Bootstrap intervals against enumeration, and their coverage on simulated data."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from provenn.core.experiment.statistics import Interval, bootstrap_mean, paired_difference


@pytest.mark.parametrize("values", [(0.0, 1.0, 10.0), (3.0, -2.0, 0.5, 7.0)])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_every_resample(values, confidence):
    """Of all the resamples that there are, the right shares lie below and above the bounds."""
    interval = bootstrap_mean(values, confidence)
    assert interval.estimate == pytest.approx(sum(values) / len(values))
    means = np.array([np.mean(picked) for picked in itertools.product(values, repeat=len(values))])
    tail, error = (1 - confidence) / 2, 0.015  # three standard errors of a share of 10,000
    assert (means < interval.low - 1e-9).mean() - error <= tail <= (means < interval.low + 1e-9).mean() + error
    assert (means > interval.high + 1e-9).mean() - error <= tail <= (means > interval.high - 1e-9).mean() + error


def test_coverage():
    """On normal data the 90% interval holds the mean in about 90% of experiments."""
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        interval = bootstrap_mean(draws.normal(2.0, 3.0, size=30), confidence=0.9, resamples=400)
        held += interval.low <= 2.0 <= interval.high
    # The percentile interval is a little narrow: about 88% at n = 30; three standard errors are 4.5%.
    assert 0.83 <= held / 400 <= 0.94


def test_width_is_that_of_the_standard_error():
    values = np.random.default_rng(1).normal(size=200)
    interval = bootstrap_mean(values)
    error = values.std() / math.sqrt(200)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert interval.estimate - interval.low == pytest.approx(1.96 * error, rel=0.1)


def test_moves_and_scales_with_the_values():
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    plain, moved = bootstrap_mean(values), bootstrap_mean(100 - 3 * values)
    assert moved.estimate == pytest.approx(100 - 3 * plain.estimate)
    # A negative factor swaps the bounds, so a mistake in one tail shows.
    assert moved.low == pytest.approx(100 - 3 * plain.high)
    assert moved.high == pytest.approx(100 - 3 * plain.low)


def test_more_confidence_is_wider():
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    widths = [bootstrap_mean(values, c).high - bootstrap_mean(values, c).low for c in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_repeatable_without_a_trace():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is watched
    assert bootstrap_mean([1.0, 2.0, 4.0]) == bootstrap_mean([1.0, 2.0, 4.0])
    assert bootstrap_mean(range(9), resamples=50) != bootstrap_mean(range(9), resamples=50, seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_order_of_seeds_matters_no_more_than_resampling():
    values = np.random.default_rng(2).normal(size=8)
    intervals = [bootstrap_mean(np.random.default_rng(i).permutation(values)) for i in range(10)]
    assert np.ptp([one.estimate for one in intervals]) < 1e-12
    for bound in ("low", "high"):
        assert np.ptp([getattr(one, bound) for one in intervals]) < 0.05 * values.std()


@pytest.mark.parametrize("value", [0.0, -3.5, 1e300])
def test_one_seed(value):
    assert bootstrap_mean([value]) == Interval(value, value, value)
    assert paired_difference([value], [1.0]) == Interval(value - 1.0, value - 1.0, value - 1.0)


def test_one_resample():
    interval = bootstrap_mean([1.0, 2.0, 4.0], resamples=1)
    assert interval.low == interval.high


def test_equal_values_have_no_width():
    assert bootstrap_mean([0.25] * 5) == Interval(0.25, 0.25, 0.25)


def test_nan_is_not_hidden():
    interval = bootstrap_mean([1.0, math.nan])
    assert math.isnan(interval.estimate)
    assert not interval.above_zero
    assert not interval.below_zero


class TestPairing:
    luck = np.random.default_rng(3).normal(0, 10, size=12)

    def test_what_a_seed_does_to_both_cancels(self):
        gain = np.random.default_rng(4).normal(0.5, 0.1, size=12)
        paired = paired_difference(self.luck + gain, self.luck)
        assert paired.above_zero
        assert paired.high - paired.low < 0.2
        assert paired == bootstrap_mean((self.luck + gain) - self.luck)
        # Out of step, the seeds' luck is back.
        assert not paired_difference(self.luck + gain, np.roll(self.luck, 1)).above_zero

    def test_the_sign_is_first_minus_second(self):
        low, high = self.luck, self.luck + 1
        assert paired_difference(high, low).estimate == pytest.approx(1)
        assert paired_difference(low, high).below_zero

    @pytest.mark.parametrize("kind", [list, tuple, lambda v: np.array(v, dtype=np.uint8), np.float16])
    def test_any_sequence_of_numbers(self, kind):
        """Small integers must not wrap around, nor halves round."""
        assert paired_difference(kind([3, 1]), kind([200, 255])).estimate == -225.5
        assert bootstrap_mean(kind([200, 255, 201])).estimate == pytest.approx(656 / 3, rel=1e-12)

    def test_options_reach_the_bootstrap(self):
        first, second = self.luck, np.zeros(12)
        assert paired_difference(first, second, 0.5, 100, 7) == bootstrap_mean(first, 0.5, 100, 7)


class TestInterval:
    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Interval(0.0, 0.0, 0.0).low = 1.0

    @pytest.mark.parametrize(
        ("low", "high", "above", "below"),
        [(0.1, 1, True, False), (0, 1, False, False), (-1, 0, False, False), (-1, -0.1, False, True)],
    )
    def test_zero(self, low, high, above, below):
        interval = Interval((low + high) / 2, low, high)
        assert (interval.above_zero, interval.below_zero) == (above, below)

    def test_words(self):
        assert str(Interval(0.123456, -1.0, 1e-7)) == "0.1235 [-1, 1e-07]"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_mean([]), r"values .*\(0,\)"),
        (lambda: bootstrap_mean([[1.0], [2.0]]), r"values .*\(2, 1\)"),
        (lambda: bootstrap_mean([1.0, 2.0], confidence=1.0), r"confidence .*1\.0"),
        (lambda: bootstrap_mean([1.0, 2.0], confidence=0), r"confidence .*0"),
        (lambda: bootstrap_mean([1.0, 2.0], confidence=95), r"confidence .*95"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=0), r"resamples .*0"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 and 2"),
        (lambda: paired_difference([], []), "values"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
