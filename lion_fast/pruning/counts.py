"""How many parameters are trained, and how many of them the masks keep: the one count of both."""

from torch import nn

from lion_fast.equilibrium.masked import Masked


def count_parameters(model: nn.Module, head: nn.Module | None = None) -> dict[str, int]:
    """Four numbers of trained parameters: "dense" (all but the head's), "kept" (those of them that no mask
    drops; biases have none), "with_head" and "kept_with_head".

    head: the part of the model that is counted apart. Frozen parameters are not counted.

    >>> from lion_fast import LionLayer
    >>> model = nn.Sequential(LionLayer(8, 4), nn.Linear(8, 2))
    >>> count_parameters(model, head=model[1])
    {'dense': 92, 'kept': 92, 'with_head': 110, 'kept_with_head': 110}
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    apart = 0 if head is None else sum(p.numel() for p in head.parameters() if p.requires_grad)
    dropped = sum(
        int((~mask).sum())
        for layer in model.modules()
        if isinstance(layer, Masked)
        for name, mask in layer.masks().items()
        if getattr(layer, name).requires_grad
    )
    return {
        "dense": trained - apart,
        "kept": trained - apart - dropped,
        "with_head": trained,
        "kept_with_head": trained - dropped,
    }
