"""Which entries to keep: what can be pruned, in which groups, ranked by which score."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import OptionError, check_choice, check_number
from lion_fast.options import BLOCKS, GRANULARITIES, SCOPES


class Matrix(NamedTuple):
    """One prunable matrix: its layer's name and module, and its own name in it."""

    layer: str
    module: Masked
    name: str

    @property
    def full_name(self) -> str:
        """The matrix' name in the model, as in its state_dict."""
        return f"{self.layer}.{self.name}" if self.layer else self.name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.module, self.name)


def find_layers(target: nn.Module | Iterable[Masked] | Mapping[str, Masked]) -> dict[str, Masked]:
    """The prunable layers of a model by name; a list of layers is numbered, a layer alone is called ''.

    Raises OptionError where there is none.

    >>> list(find_layers(nn.Sequential(nn.Linear(2, 4), LionLayer(4, 2))))
    ['1']
    """
    if isinstance(target, nn.Module):
        found = {name: m for name, m in target.named_modules() if isinstance(m, Masked)}
    elif isinstance(target, Mapping):
        found = dict(target)
    else:
        found = {str(i): m for i, m in enumerate(target)}
    for name, module in found.items():
        if not isinstance(module, Masked):
            raise OptionError(f"{name!r} is a {type(module).__name__}; only LionLayer ends can be pruned")
    if not found:
        raise OptionError("there is no LionLayer to prune; give a model that has one, or layers")
    return found


def find_matrices(layers: Mapping[str, Masked]) -> list[Matrix]:
    """Every matrix of the layers that can be pruned: A, V and W where they have it. Biases are exempt."""
    return [
        Matrix(layer, module, name)
        for layer, module in layers.items()
        for name in module.matrices
        if getattr(module, name) is not None
    ]


def check_target(
    matrices: list[Matrix], keep: float, granularity: str, block: int, scope: str, trained: bool = True
) -> None:
    """Raise OptionError where these matrices cannot be pruned this way; `trained`: frozen ones neither."""
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("scope", scope, SCOPES)
    check_number("keep", keep, above=0, most=1, note="the share of entries to keep")
    if granularity == "2:4" and keep != 0.5:
        raise OptionError(f"granularity 2:4 keeps half of the entries: keep must be 0.5; got {keep!r}")
    if granularity == "block" and block not in BLOCKS:
        raise OptionError(f"block must be one of {', '.join(map(str, BLOCKS))}; got {block!r}")
    for matrix in matrices:
        shape = tuple(matrix.parameter.shape)
        if getattr(matrix.module, "compacted_from", None) is not None:
            raise OptionError(
                f"{matrix.layer or 'the layer'} is already compacted: its dead units are gone for good. "
                "Prune the layer before compact(), or train a new one"
            )
        if trained and not matrix.parameter.requires_grad:
            raise OptionError(
                f"{matrix.full_name} is frozen (requires_grad is False); set requires_grad_() on its layer"
            )
        if granularity != "element" and not isinstance(matrix.module, (LionLayer, StateLayer)):
            raise OptionError(
                f"granularity {granularity!r} needs LionLayer or StateLayer ends; {matrix.full_name} belongs "
                f"to a {type(matrix.module).__name__}, which takes 'element' only"
            )
        if granularity == "2:4" and shape[1] % 4:
            raise OptionError(
                f"granularity 2:4 needs rows of a multiple of 4 entries; {matrix.full_name} is {shape}"
            )
        if granularity == "block" and min(shape) < block:
            raise OptionError(
                f"blocks of {block} x {block} do not fit {matrix.full_name} of shape {shape}; "
                f"take a smaller block ({', '.join(map(str, BLOCKS))}), units or elements"
            )


def _blocks(values: Tensor, block: int) -> Tensor:
    """The mean of each block x block tile, edges over the entries that exist: [m, n] -> [ceil, ceil]."""

    def sums(t: Tensor) -> Tensor:
        rows, columns = (-(-size // block) for size in t.shape)
        t = F.pad(t, (0, columns * block - t.shape[1], 0, rows * block - t.shape[0]))
        return t.reshape(rows, block, columns, block).sum((1, 3))

    return sums(values) / sums(torch.ones_like(values))


def _units(values: Mapping[str, Tensor]) -> Tensor:
    """The mean over what belongs to each hidden unit: its row of A, row and column of W, column of V.

    A tied layer has no W, a `StateLayer` no V.
    """
    A, V, W = values["A"], values.get("V"), values.get("W")
    total, size = A.sum(1), A.shape[1]
    if V is not None:
        total, size = total + V.sum(0), size + V.shape[0]
    if W is not None:
        total = total + W.sum(0) + W.sum(1) - W.diagonal()
        size += 2 * W.shape[0] - 1
    return total / size


def _top(score: Tensor, ties: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest scores; equal ones by the larger `ties`, then by the lower index."""
    order = torch.sort(ties, descending=True, stable=True).indices
    order = order[torch.sort(score[order], descending=True, stable=True).indices]
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def count_kept(keep: float, total: int) -> int:
    """ceil(keep * total) for keep in (0, 1], whole numbers being met in spite of rounding.

    >>> count_kept(0.5, 5), count_kept(0.1, 30)
    (3, 3)
    """
    return max(1, math.ceil(keep * total * (1 - 1e-12)))


def select(
    matrices: list[Matrix],
    scores: Mapping[str, Tensor],
    keep: float,
    granularity: str = "element",
    block: int = 32,
    scope: str = "global",
    growth: Mapping[str, Tensor] | None = None,
    regrow: float = 0.0,
) -> dict[str, Tensor]:
    """Masks by full name that keep the best ceil(keep * n) of n entries, units or blocks.

    scores: one value per entry of each matrix. Groups are ranked by the mean over their entries, over all
        matrices together ("global"), or within each layer or matrix. Equal scores go by magnitude.
    growth, regrow: of the kept count, this share goes instead to the largest `growth` among the rest.

    2:4 keeps the best two of each four neighbours in a row, whatever the scope.

    Raises OptionError where a score is NaN or Inf, which has no place in a ranking.
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise OptionError(f"{name} or its gradient holds NaN or Inf: load it again or train anew")
    sizes = {m.full_name: m.parameter.detach().abs().float() for m in matrices}
    if granularity == "2:4":
        return {m.full_name: _two_of_four(scores[m.full_name], sizes[m.full_name]) for m in matrices}

    def grouped(values: Mapping[str, Tensor]) -> list[tuple[str, str, Tensor]]:
        """(layer, matrix or '', a value per group)."""
        if granularity == "unit":
            layers: dict[str, dict[str, Tensor]] = {}
            for m in matrices:
                layers.setdefault(m.layer, {})[m.name] = values[m.full_name]
            return [(layer, "", _units(found)) for layer, found in layers.items()]
        if granularity == "block":
            return [(m.layer, m.full_name, _blocks(values[m.full_name], block)) for m in matrices]
        return [(m.layer, m.full_name, values[m.full_name]) for m in matrices]

    score, ties = grouped(scores), grouped(sizes)
    more = grouped(growth) if regrow and growth is not None else None
    pools: dict[str, list[int]] = {}
    for i, (layer, name, _) in enumerate(score):
        pools.setdefault({"global": "", "layer": layer, "matrix": name or layer}[scope], []).append(i)
    chosen: list[Tensor] = [torch.empty(0)] * len(score)
    for pool in pools.values():
        flat = [torch.cat([values[i][2].flatten() for i in pool]) for values in (score, ties)]
        count = count_kept(keep, flat[0].numel())
        grown = int(regrow * count) if more is not None else 0
        mask = _top(*flat, count - grown)
        if more is not None and grown:
            rest = torch.cat([more[i][2].flatten() for i in pool]).masked_fill(mask, -1.0)
            mask |= _top(rest, flat[1], grown)
        for i, part in zip(pool, mask.split([score[i][2].numel() for i in pool]), strict=True):
            chosen[i] = part.view_as(score[i][2])
    if granularity == "unit":
        units = {layer: mask for (layer, _, _), mask in zip(score, chosen, strict=True)}
        return {m.full_name: unit_mask(m.name, units[m.layer], m.parameter.shape) for m in matrices}
    if granularity == "block":
        return {
            m.full_name: expand_blocks(mask, block, m.parameter.shape)
            for m, mask in zip(matrices, chosen, strict=True)
        }
    return {m.full_name: mask for m, mask in zip(matrices, chosen, strict=True)}


def unit_mask(name: str, units: Tensor, shape: torch.Size) -> Tensor:
    """The mask of A, W or V that keeps exactly what belongs to the kept units [R]."""
    if name == "W":
        return units[:, None] & units[None, :]
    return (units[:, None] if name == "A" else units[None, :]).expand(shape).contiguous()


def expand_blocks(mask: Tensor, block: int, shape: torch.Size) -> Tensor:
    """A mask of blocks as one of entries, cut to `shape`."""
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]].contiguous()


def _two_of_four(score: Tensor, ties: Tensor) -> Tensor:
    shape = score.shape
    score, ties = score.reshape(-1, 4), ties.reshape(-1, 4)
    order = torch.sort(ties, dim=1, descending=True, stable=True).indices
    ranked = torch.sort(score.gather(1, order), dim=1, descending=True, stable=True).indices
    best = order.gather(1, ranked)[:, :2]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True).view(shape)
