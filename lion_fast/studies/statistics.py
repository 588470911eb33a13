"""Intervals for accuracies and their differences: a bootstrap over seeds and, within each, over images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lion_fast.errors import DataError, check_choice

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A point, the ends of its interval, and the resampled values it comes from."""

    point: float
    low: float
    high: float
    resampled: np.ndarray

    @classmethod
    def of(cls, point: float, resampled: np.ndarray) -> "Estimate":
        """With the percentile interval of the resampled values."""
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(resampled, [tail, 100 - tail])
        return cls(point, float(low), float(high), resampled)


def paired_difference(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    *,
    metric: str = "accuracy",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """First minus second in accuracy or balanced accuracy, mean over seeds, with its 95 % interval.

    Args:
        first: Per seed, whether each test image is right by the first method, bool (n,).
        second: The same images by the second method.
        labels: Their classes, integers (n,).
        metric: "accuracy" or "balanced_accuracy" (mean over the classes that occur).
        resamples: Bootstrap resamples: seeds are drawn with replacement, and for each drawn seed its images
            are. Both methods get the same images, so what is hard for both cancels.
        seed: Of the resampling; the same input gives the same interval.

    Raises:
        DataError: No seeds, or arrays of different lengths.

    Example:
        >>> right = [np.array([True, False, True, True])]
        >>> some = paired_difference(right, right, [np.array([0, 0, 1, 1])])
        >>> some.point, some.low, some.high
        (0.0, 0.0, 0.0)
    """
    check_choice("metric", metric, ("accuracy", "balanced_accuracy"))
    if not len(first) == len(second) == len(labels) or not len(first):
        raise DataError("a paired difference needs the same seeds of both methods, at least one")
    rng = np.random.default_rng(seed)
    count = len(first)
    points = np.empty(count)
    drawn = rng.integers(count, size=(resamples, count))  # [resample, place] -> seed
    values = np.empty((resamples, count))
    for i, (a, b, classes) in enumerate(zip(first, second, labels, strict=True)):
        if not len(a) == len(b) == len(classes) or not len(a):
            raise DataError(f"{len(a)}, {len(b)} results and {len(classes)} labels must be as many, and some")
        difference = np.asarray(a, dtype=np.int64) - np.asarray(b, dtype=np.int64)
        groups = np.zeros(len(a), dtype=np.int64)
        if metric == "balanced_accuracy":
            groups = np.unique(classes, return_inverse=True)[1]
        # How often each (class, difference) occurs says all that resampling images can change
        table = np.zeros((groups.max() + 1, 3))
        np.add.at(table, (groups, difference + 1), 1)
        points[i] = _mean_over_groups(table[None])[0]
        here = drawn == i
        counts = rng.multinomial(len(a), table.ravel() / len(a), size=int(here.sum()))
        values[here] = _mean_over_groups(counts.reshape(-1, *table.shape))
    return Estimate.of(float(points.mean()), values.mean(1))


def accuracy(
    correct: Sequence[np.ndarray], labels: Sequence[np.ndarray], *, metric: str = "accuracy", **options
) -> Estimate:
    """The accuracy itself, mean over seeds, with its interval; arguments as of `paired_difference`."""
    nothing = [np.zeros(len(c), dtype=bool) for c in correct]
    return paired_difference(correct, nothing, labels, metric=metric, **options)


def mean_over_sets(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates on different sets; the sets are taken as given, not as drawn from others."""
    resampled = np.mean([e.resampled for e in estimates], axis=0)
    return Estimate.of(float(np.mean([e.point for e in estimates])), resampled)


def _mean_over_groups(counts: np.ndarray) -> np.ndarray:
    """(resamples, groups, counts of -1, 0, 1) -> mean of each group, averaged over those present."""
    images = counts.sum(2)
    shares = (counts[..., 2] - counts[..., 0]) / np.maximum(images, 1)
    return shares.sum(1) / (images > 0).sum(1)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share seen in n draws.

    >>> low, high = wilson(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
