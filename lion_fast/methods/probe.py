"""Linear probe: the frozen backbone, and a head."""

from torch import Tensor, nn

from lion_fast.errors import check_whole
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.read_out import FINEST, Cells, features_and_cells, map_place


@register("probe")
class Probe(TunedModel):
    """The head alone is trained, on the features of the frozen backbone: K (F + 1) numbers.

    With `grid`, the head also reads the map that LION's default variant reads, every channel of every cell:
    K (F + g^2 C + 1) numbers for a map of C channels. What is left of LION's gain beside it is the states'.

    Args:
        grid: cells along each side of a map from inside the backbone; None: no map.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> probe = Probe(load_backbone("resnet10t", pretrained=False), num_classes=10)
    >>> probe.num_trainable(), probe.num_trainable(head=True)
    (0, 5130)
    """

    def __init__(
        self, backbone, num_classes: int, *, grid: int | None = None, head_bias: bool = True, **options
    ):
        super().__init__(backbone, num_classes, head_bias=head_bias, **options)
        self.grid, self.cells = grid, None
        self.record(grid=grid)
        if grid is not None:
            check_whole("grid", grid, most=FINEST)
            at = map_place(self.backbone)
            self.cells = Cells(self.backbone.pooled_width(self.pool), grid**2, self.backbone.map_widths[at])
            self.head = self.new_head(self.cells.out_features, head_bias)

    def encode(self, images: Tensor) -> Tensor:
        if self.cells is None:
            return super().encode(images)
        y, maps = self.backbone.body_and_map(self.backbone.enter(images), map_place(self.backbone))
        return features_and_cells(self.backbone.pool(y, self.pool), maps, self.grid)

    def encoding(self) -> tuple:
        return (*super().encoding(), self.grid)

    def behind(self) -> nn.Module:
        return self.head if self.cells is None else nn.Sequential(self.cells, self.head)

    def features(self, images: Tensor) -> Tensor:
        encoded = self.encode(images)
        return encoded if self.cells is None else self.cells(encoded)
