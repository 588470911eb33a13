"""Dead hidden units taken out: a smaller dense layer with the same outputs."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.contraction import contraction_scale
from lion_fast.equilibrium.layer import LionLayer, broken_weights
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import OptionError
from lion_kernels.reference import ACTIVATIONS, accumulate_dtype

# Applications that the constant units get to come to rest, at their rate of at most gamma.
SETTLE = 5000


def _reach(start: Tensor, edges: Tensor) -> Tensor:
    """All units that can be reached from `start` [R] where edges[i, j] leads from j to i."""
    while True:
        more = start | edges[:, start].any(1)
        if torch.equal(more, start):
            return start
        start = more


@torch.no_grad()
def find_units(layer: LionLayer) -> tuple[Tensor, Tensor]:
    """Which hidden units do something, and which are constant: two boolean [R], `live` and `constant`.

    A unit that reaches no output (its column of V is zero, and what it feeds reaches none either) is
    neither. A unit that no token reaches (its row of A is zero, and so for all that feeds it) is constant.

    >>> layer = LionLayer(4, 2)
    >>> _ = layer.V.data[:, 0].zero_(), layer.W.data.zero_()
    >>> [t.tolist() for t in find_units(layer)]
    [[False, True], [False, False]]
    """
    links = layer.recurrence_matrix() != 0
    needed = _reach((layer.masked("V") != 0).any(0), links.T)
    varying = _reach((layer.masked("A") != 0).any(1), links)
    return needed & varying, needed & ~varying


@torch.no_grad()
def compact(layer: LionLayer) -> LionLayer:
    """A layer without the units that do nothing, with the same outputs; `layer` itself stays as it is.

    Dropped exactly are the units that reach no output. Constant units, which no token reaches, are folded:
    into b of the units they feed by W and into c by V. That is exact at the equilibrium, so outputs agree
    to what the solver's tolerance leaves; units that nothing feeds back agree at every step.

    The new W is the bounded Wh, whose own bound is not larger, so the recurrence is the same where the
    bound is at work too. A tied layer stays tied where A V has the same scale without the dead units, and
    becomes a free one with W = Wh, R x R numbers more, where not. Element masks are cut to size. A layer
    without dead units comes back as a copy; one without live ones keeps a single unit of zeros.

    Raises OptionError for something else than a LionLayer, a `StateLayer` among it: its states are outputs;
    and for weights that hold NaN or Inf.

    >>> from lion_fast import pruning
    >>> layer = LionLayer(8, 4)
    >>> pruning.prune_once(layer, 0.5, granularity="unit")
    >>> pruning.compact(layer).state_dim
    2
    """
    if isinstance(layer, StateLayer):
        raise OptionError(
            "a StateLayer cannot be compacted: every state is an output, which the head reads by its place. "
            "Masks are saved packed; for fewer units train with a smaller state_dim"
        )
    if not isinstance(layer, LionLayer):
        raise OptionError(f"only a LionLayer can be compacted; got {type(layer).__name__}")
    if broken := broken_weights(layer):
        raise OptionError(broken)
    masks = layer.masks()
    live, constant = find_units(layer)
    Wh, A, V = layer.recurrence_matrix(), layer.masked("A"), layer.masked("V")
    phi = ACTIVATIONS[layer.activation].phi
    b, c, W64, V64 = (t.double() for t in (layer.b, layer.c, Wh, V))
    values = torch.zeros_like(b[constant])
    for _ in range(SETTLE):
        new = phi(W64[constant][:, constant] @ values + b[constant])
        settled = torch.equal(new, values) or bool((new - values).abs().max() < 1e-15 * new.abs().max())
        values = new
        if settled:
            break
    # With a single application of f nothing has come through W yet.
    if not settled or (layer.max_iter == 1 and W64[live][:, constant].any()):
        live, constant = live | constant, torch.zeros_like(constant)
        values = values[:0]
    if live.all():
        return copy.deepcopy(layer)

    new = copy.deepcopy(layer)
    kept = live.nonzero().squeeze(1)
    keep_tied = layer.W is None and _same_scale(layer, A, V, kept)
    tensors = {
        "A": A[kept],
        "b": (b[kept] + W64[kept][:, constant] @ values).to(layer.b.dtype),
        "V": V[:, kept],
        "c": (c + V64[:, constant] @ values).to(layer.c.dtype),
    }
    if not keep_tied:
        tensors["W"] = Wh[kept][:, kept]
        new.recurrence = "free"
    masks = {
        name: {"A": mask[kept], "W": mask[kept][:, kept], "V": mask[:, kept]}[name]
        for name, mask in masks.items()
    }
    if not len(kept):
        tensors = {name: _single(name, t) for name, t in tensors.items()}
        masks = {}
    for name in new.masks():
        new.set_mask(name, None)
    for name, tensor in tensors.items():
        trained = (layer.A if name == "W" else getattr(layer, name)).requires_grad
        setattr(new, name, nn.Parameter(tensor.clone(), requires_grad=trained))
    for name, mask in masks.items():
        if name in tensors and not mask.all():
            new.set_mask(name, mask)
    new.state_dim = new.A.shape[0]
    new.compacted_from = layer.compacted_from or layer.state_dim
    return new


def _single(name: str, t: Tensor) -> Tensor:
    """The tensor of a layer that has one unit, all zeros, in place of none."""
    if name == "c":
        return t
    return t.new_zeros([max(size, 1) for size in t.shape])


def _same_scale(layer: LionLayer, A: Tensor, V: Tensor, kept: Tensor) -> bool:
    limit = layer.gamma / ACTIVATIONS[layer.activation].lipschitz
    if not len(kept):
        return True
    dtype, acc = A.dtype, accumulate_dtype(A.dtype)
    A, V = A.to(acc), V.to(acc)
    whole, part = (contraction_scale(M, limit, dtype) for M in (A @ V, A[kept] @ V[:, kept]))
    return bool((whole - part).abs() <= 4 * torch.finfo(whole.dtype).eps)


def describe_compacted(model: nn.Module) -> dict[str, dict]:
    """Widths and recurrence of each compacted layer by name, for `restore_compacted`; JSON-able."""
    return {
        name: {"state_dim": m.state_dim, "recurrence": m.recurrence, "compacted_from": m.compacted_from}
        for name, m in model.named_modules()
        if isinstance(m, LionLayer) and m.compacted_from is not None
    }


def restore_compacted(model: nn.Module, described: Mapping[str, Mapping]) -> None:
    """Replace layers by ones of the described widths, with weights of zero, ready for a state_dict.

    Raises OptionError where the description does not fit the model.
    """
    if not isinstance(described, Mapping) or not all(isinstance(f, Mapping) for f in described.values()):
        raise OptionError(f"compacted layers must be described by name; got {described!r}")
    for name, wanted in described.items():
        layer = dict(model.named_modules()).get(name)
        state, recurrence, whole = (wanted.get(k) for k in ("state_dim", "recurrence", "compacted_from"))
        fits = isinstance(layer, LionLayer) and all(type(n) is int for n in (state, whole))
        if not (fits and 1 <= state < whole == layer.state_dim and recurrence in ("free", layer.recurrence)):
            raise OptionError(f"{name} cannot be given the compacted widths {dict(wanted)}")
        new = copy.deepcopy(layer)
        shapes = {"A": (state, layer.dim), "b": (state,), "V": (layer.dim, state)}
        if recurrence == "free":
            shapes["W"] = (state, state)
        for key, shape in shapes.items():
            setattr(new, key, nn.Parameter(layer.A.new_zeros(shape)))
        new.state_dim, new.recurrence, new.compacted_from = state, recurrence, whole
        model.set_submodule(name, new)


def compact_model(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Compact every LionLayer inside a model, in place; (units before, units now) by the layer's name.

    A `StateLayer` stays as it is, see `compact`.

    Raises OptionError where the model is itself a layer, which cannot be replaced.
    """
    if isinstance(model, LionLayer):
        raise OptionError("a layer cannot be replaced inside itself: use layer = compact(layer)")
    found = {name: m for name, m in model.named_modules() if isinstance(m, LionLayer)}
    changed = {}
    for name, layer in found.items():
        new = compact(layer)
        changed[name] = (layer.state_dim, new.state_dim)
        if new.state_dim != layer.state_dim:
            model.set_submodule(name, new)
    return changed
