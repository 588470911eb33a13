"""Intervals of accuracies and of their differences, against formulas and slow resampling."""

import numpy as np
import pytest

from lion_fast.errors import DataError, OptionError
from lion_fast.studies.statistics import accuracy, mean_over_sets, paired_difference

METRICS = ("accuracy", "balanced_accuracy")


def draws(rng, shares, n):
    return [rng.random(n) < p for p in shares]


@pytest.mark.parametrize("metric", METRICS)
def test_no_difference_is_exactly_nothing_and_every_difference_exactly_one(metric):
    rng = np.random.default_rng(0)
    right, labels = draws(rng, [0.6, 0.8, 0.7], 50), [rng.integers(0, 4, 50) for _ in range(3)]
    yes, no = [np.ones(50, bool)] * 3, [np.zeros(50, bool)] * 3
    for first, second, expected in ((right, right, 0.0), (yes, no, 1.0)):
        found = paired_difference(first, second, labels, metric=metric)
        assert {found.point, found.low, found.high, *found.resampled} == {expected}


def test_points_by_hand():
    labels = [np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])]
    a = [np.array([1, 1, 0, 1], bool), np.array([1, 1, 0, 0], bool)]
    b = [np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)]
    assert paired_difference(a, b, labels).point == pytest.approx((2 / 4 + 0 / 4) / 2)
    # seed 1: class 0 by 1/3, class 1 by 1; seed 2: class 0 by 1, class 1 by -1/3
    expected = ((1 / 3 + 1) / 2 + (1 - 1 / 3) / 2) / 2
    assert paired_difference(a, b, labels, metric="balanced_accuracy").point == pytest.approx(expected)
    assert accuracy(a, labels).point == pytest.approx((3 / 4 + 2 / 4) / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_resampling_agrees_with_resampling_image_by_image(metric):
    """The counts drawn by class and difference are a plain bootstrap of seeds and images."""
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 3, 40) for _ in range(3)]
    a, b = draws(rng, [0.9, 0.7, 0.8], 40), draws(rng, [0.6, 0.65, 0.7], 40)
    found = paired_difference(a, b, labels, metric=metric, resamples=20_000)

    def value(i, where):
        d, k = a[i][where].astype(float) - b[i][where], labels[i][where]
        return d.mean() if metric == "accuracy" else np.mean([d[k == c].mean() for c in np.unique(k)])

    plain = [np.mean([value(i, rng.integers(0, 40, 40)) for i in rng.integers(0, 3, 3)]) for _ in range(4000)]
    assert found.resampled.mean() == pytest.approx(np.mean(plain), abs=0.005)
    assert found.resampled.std() == pytest.approx(np.std(plain), rel=0.05)
    assert [found.low, found.high] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.012)


def test_one_seed_is_the_spread_of_its_images():
    n, d = 400, 0.1
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    a[: int(d * n)] = True
    found = paired_difference([a], [b], [np.zeros(n, int)])
    half = 1.96 * (d * (1 - d) / n) ** 0.5
    assert found.point == pytest.approx(d)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.07)


def test_seeds_that_differ_widen_the_interval():
    n = 1000
    labels = [np.zeros(n, int)] * 4
    none = [np.zeros(n, bool)] * 4
    same, apart = [], []
    for k in range(4):
        same.append(np.arange(n) < 200)
        apart.append(np.arange(n) < (100 if k % 2 else 300))
    narrow, wide = (paired_difference(x, none, labels) for x in (same, apart))
    assert [narrow.point, wide.point] == pytest.approx([0.2, 0.2])
    # means of four seeds drawn from two at 0.1 and two at 0.3: standard deviation 0.1 / 2
    assert wide.resampled.std() == pytest.approx((0.05**2 + 0.2 * 0.8 / n / 4) ** 0.5, rel=0.1)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Ten seeds whose true difference varies around 5 points; few seeds cost some coverage."""
    rng = np.random.default_rng(1)
    covered, trials = 0, 200
    for _ in range(trials):
        a, b = [], []
        for shift in rng.normal(0.05, 0.03, 10):
            u = rng.random(100)
            b.append(u < 0.6)
            a.append(u < 0.6 + shift)
        found = paired_difference(a, b, [np.zeros(100, int)] * 10, resamples=1000)
        covered += found.low <= 0.05 <= found.high
    assert 0.86 <= covered / trials <= 0.99


def test_the_mean_over_sets():
    rng = np.random.default_rng(2)
    labels = [np.zeros(200, int)] * 3
    found = [
        paired_difference(draws(rng, [p] * 3, 200), draws(rng, [0.5] * 3, 200), labels, seed=k)
        for k, p in enumerate((0.6, 0.8))
    ]
    mean = mean_over_sets(found)
    assert mean.point == pytest.approx((found[0].point + found[1].point) / 2)
    spread = (sum(f.resampled.var() for f in found) / 4) ** 0.5  # of independent sets
    assert mean.resampled.std() == pytest.approx(spread, rel=0.05)


def test_unpaired_results_are_refused():
    with pytest.raises(DataError, match="same seeds"):
        paired_difference([], [], [])
    with pytest.raises(DataError, match="as many"):
        paired_difference([np.ones(3, bool)], [np.ones(4, bool)], [np.zeros(3, int)])
    with pytest.raises(OptionError, match="metric"):
        paired_difference([], [], [], metric="loss")
