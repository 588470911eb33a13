"""Linear probe: the frozen backbone, and a head."""

from lion_fast.methods.base import TunedModel, register


@register("probe")
class Probe(TunedModel):
    """The head alone is trained, on the features of the frozen backbone: K (F + 1) numbers.

    >>> from lion_fast import load_backbone
    >>> probe = Probe(load_backbone("resnet10t", pretrained=False), num_classes=10)
    >>> probe.num_trainable(), probe.num_trainable(head=True)
    (0, 5130)
    """
