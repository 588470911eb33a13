"""What robust training is compared with: one-shot pruning and the lottery ticket's rewinding."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.masked import Masked
from lion_fast.errors import OptionError, check_choice, check_seed, check_whole
from lion_fast.options import CRITERIA
from lion_fast.pruning.masks import check_target, find_layers, find_matrices, select


@torch.no_grad()
def prune_once(
    target: nn.Module | Iterable[Masked] | Mapping[str, Masked],
    keep: float,
    *,
    criterion: str = "magnitude",
    granularity: str = "element",
    block: int = 32,
    scope: str = "global",
    seed: int = 0,
) -> None:
    """Set masks that keep the best ceil(keep * n) entries, units or blocks, by the weights as they are.

    criterion: "magnitude" |w|; "random", from `seed`; "saliency" |w dL/dw| by the gradients that are there.
    The options are `RobustPruner`'s. What an earlier mask dropped stays dropped, so `keep` counts from the
    dense layer. The layers carry their masks: any optimiser made after this trains the kept entries only.

    Raises OptionError for options that do not fit, and for weights or gradients that hold NaN or Inf.

    >>> from lion_fast import LionLayer
    >>> layer = LionLayer(8, 4)
    >>> prune_once(layer, keep=0.25)
    >>> int(sum((getattr(layer, name) != 0).sum() for name in "AWV"))
    20
    """
    check_choice("criterion", criterion, CRITERIA)
    matrices = find_matrices(find_layers(target))
    check_target(matrices, keep, granularity, block, scope, trained=False)
    check_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {}
    for m in matrices:
        p = m.parameter
        if criterion == "random":
            score = torch.rand(p.shape, generator=generator).to(p.device)
        elif criterion == "magnitude":
            score = p.abs().float()
        elif p.grad is None:
            raise OptionError(f"criterion 'saliency' needs gradients: {m.full_name} has none, run backward")
        else:
            score = (p.float() * p.grad.float()).abs()
        mask = m.module.masks().get(m.name)
        scores[m.full_name] = score if mask is None else score.masked_fill(~mask, -1.0)
    masks = select(matrices, scores, keep, granularity, block, scope)
    for m in matrices:
        m.module.set_mask(m.name, masks[m.full_name])


def iterative_magnitude(
    target: nn.Module,
    train: Callable[[], object],
    *,
    keep: float,
    rounds: int = 5,
    rewind_to: Mapping[str, Tensor] | None = None,
    **options,
) -> None:
    """Iterative magnitude pruning with rewinding, the search for a lottery ticket.

    Each round calls `train()`, prunes by magnitude to keep^(round / rounds), and puts what the target
    trains back to `rewind_to` (its weights of an early step, by name; None: those at the call), masked. The
    target is then the ticket: masked and rewound, for a last training. `train` must make its optimiser
    anew. `options` are `prune_once`'s.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; rewinding to an early step:
    Frankle et al., ICML 2020.
    """
    check_whole("rounds", rounds)
    trained = {name: p for name, p in target.named_parameters() if p.requires_grad}
    given = trained if rewind_to is None else rewind_to
    if missing := trained.keys() - given.keys():
        raise OptionError(f"rewind_to lacks {', '.join(sorted(missing))}; give the target's state_dict()")
    start = {name: given[name].detach().clone() for name in trained}
    layers = find_layers(target)
    check_target(find_matrices(layers), keep, "element", 32, "global")
    for k in range(1, rounds + 1):
        train()
        prune_once(target, keep ** (k / rounds), **options)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(start[name])
            for layer in layers.values():
                for name, mask in layer.masks().items():
                    layer.set_mask(name, mask)
