"""Seeded draws: stratified splits, few-shot and long-tail subsets.

Every draw orders all items once by `torch.randperm` under its seed and takes the first ones of
each class, so with one seed a smaller draw is contained in a larger one. Draws of whole groups go by
the same order; they are nested as far as no group has more than one item.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lion_fast.errors import DataError, check_choice, check_number, check_whole
from lion_fast.options import SCARCE

MOST_CLASSES = 1_000_000


def as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """Labels as int64 (N,); DataError where they are not whole numbers from 0 to below `MOST_CLASSES`."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels must be a vector of whole numbers: {error}") from error
    other = found.dtype == torch.bool or found.is_floating_point() or found.is_complex()
    if found.ndim != 1 or (other and len(found)):
        raise DataError(f"labels must be a vector of whole numbers; got {found.dtype} {tuple(found.shape)}")
    found = found.to(torch.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < MOST_CLASSES:
        raise DataError(f"labels must be numbers 0..K-1 of classes; found {found.min()}..{found.max()}")
    return found


def _first_of_each(
    labels: Tensor, counts: list[int], seed: int, groups: Sequence[Hashable] | None = None
) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if groups is not None:
        return _whole_groups(labels, counts, order, groups)
    ordered = labels[order]
    taken = [order[ordered == k][:n] for k, n in enumerate(counts)]
    return torch.cat(taken).sort().values if taken else order[:0]


def _whole_groups(labels: Tensor, counts: list[int], order: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Whole groups that have about so many items of each class.

    First every group that fits, in order, which meets the counts where enough groups are small. Then, the
    small ones first, what comes nearer to them or is of classes that have none yet, and at most half of what
    is left of a class.
    """
    members: dict[Hashable, list[int]] = {}
    for i in order.tolist():
        members.setdefault(groups[i], []).append(i)
    label = labels.tolist()
    sizes = {group: Counter(label[i] for i in items) for group, items in members.items()}
    left, wanted, taken = Counter(label), Counter(dict(enumerate(counts))), []

    def take(group: Hashable) -> None:
        taken.extend(members[group])
        left.subtract(sizes[group])
        wanted.subtract(sizes[group])

    rest = []
    for group, of in sizes.items():
        if all(n <= wanted[k] for k, n in of.items()):
            take(group)
        else:
            rest.append(group)
    for group in sorted(rest, key=lambda group: len(members[group])):
        of = sizes[group]
        nearer = sum((wanted[k] - n) ** 2 - wanted[k] ** 2 for k, n in of.items()) <= 0
        first = all(wanted[k] == counts[k] > 0 for k in of)
        if (nearer or first) and all(2 * n <= left[k] for k, n in of.items()):
            take(group)
    return torch.tensor(sorted(taken), dtype=torch.int64)


def _class_counts(labels: Tensor) -> tuple[Tensor, Tensor]:
    labels = as_labels(labels)
    if len(labels) == 0:
        raise DataError("labels must be a non-empty vector")
    return labels, torch.bincount(labels)


def draw_per_class(labels: Tensor, n: int, seed: int = 0, scarce: str = "error") -> Tensor:
    """Indices of exactly `n` items of every class, sorted, int64 (n * K,).

    labels: int64 (N,). scarce: of a class with fewer than n items, "all" takes all there are and "error"
    raises DataError.

    >>> import torch
    >>> from lion_fast.data import draw_per_class
    >>> labels = torch.tensor([0, 0, 0, 1, 1])
    >>> labels[draw_per_class(labels, 2)].tolist()
    [0, 0, 1, 1]
    """
    check_whole("n_per_class", n)
    check_choice("scarce", scarce, SCARCE)
    labels, counts = _class_counts(labels)
    short = {k: c for k, c in enumerate(counts.tolist()) if c < n}
    if short and scarce == "error":
        listed = ", ".join(f"class {k} has {c}" for k, c in list(short.items())[:5])
        raise DataError(
            f"n_per_class={n} needs {n} training images of every class, but {listed}"
            f"{', ...' if len(short) > 5 else ''}; the most possible is {min(counts.tolist())}; "
            'scarce="all" takes all there are of such a class'
        )
    return _first_of_each(labels, [n] * len(counts), seed)


def long_tail_counts(counts: Tensor | list[int], imbalance: float) -> list[int]:
    """n_k = floor(n_max * imbalance^(-k / (K - 1))), at least 1, for classes k = 0..K-1.

    counts: items available of each class. n_max is the largest number for which no class asks for
    more than it has; for balanced data, the class size. Class 0 is the head. The profile of Cui et
    al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019).

    >>> from lion_fast.data import long_tail_counts
    >>> long_tail_counts([5000] * 10, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    check_number("imbalance", imbalance, least=1, note="the ratio of the largest to the smallest class")
    counts = [int(c) for c in counts]
    if len(counts) < 2 or min(counts) < 1:
        raise DataError(
            f"a long-tail draw needs at least two classes, none of them empty; got sizes {counts}"
        )
    share = [imbalance ** (-k / (len(counts) - 1)) for k in range(len(counts))]
    n_max = min(c / s for c, s in zip(counts, share, strict=True))
    # 1e-6: 5000 * 100**-1 must not become 49 by rounding
    return [max(1, min(c, int(n_max * s + 1e-6))) for c, s in zip(counts, share, strict=True)]


def draw_long_tail(labels: Tensor, imbalance: float, seed: int = 0) -> Tensor:
    """Indices of a long-tailed subset with the class sizes of `long_tail_counts`, sorted, int64.

    labels: int64 (N,) with every class present.

    >>> import torch
    >>> from lion_fast.data import draw_long_tail
    >>> labels = torch.arange(3).repeat(100)
    >>> torch.bincount(labels[draw_long_tail(labels, 100.0)]).tolist()
    [100, 10, 1]
    """
    labels, counts = _class_counts(labels)
    return _first_of_each(labels, long_tail_counts(counts, imbalance), seed)


def draw_fraction(
    labels: Tensor, fraction: float, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Tensor:
    """Indices of a stratified share: round(fraction * n_k) of class k, sorted.

    Of a class with two or more items at least one is taken and at least one left; a class with a
    single item is left whole.
    groups: of each item its group; whole groups are then taken, of about as many items.
    """
    labels, counts = _class_counts(labels)
    sizes = [0 if c < 2 else min(c - 1, max(1, int(fraction * c + 0.5))) for c in counts.tolist()]
    return _first_of_each(labels, sizes, seed, groups)


def draw_total(labels: Tensor, total: int, seed: int = 0, groups: Sequence[Hashable] | None = None) -> Tensor:
    """Indices of exactly `total` items, stratified by largest remainder, sorted.

    groups: of each item its group; whole groups are then taken, of `total` items where enough are small.
    """
    labels, counts = _class_counts(labels)
    check_whole("a number of images", total)
    if total > len(labels):
        raise DataError(f"{total} images asked for, {len(labels)} available")
    exact = counts.double() * total / len(labels)
    sizes = exact.floor().long()
    remainder = (exact - sizes).sort(descending=True, stable=True).indices
    sizes[remainder[: total - int(sizes.sum())]] += 1
    return _first_of_each(labels, sizes.tolist(), seed, groups)
