"""Linear probe: the frozen backbone, and a head."""

from collections.abc import Mapping, Sequence
from typing import Any

from lion_fast.methods.base import register
from lion_fast.methods.reading import Cells, ReadingModel, map_place


@register("probe")
class Probe(ReadingModel):
    """The head alone is trained, on the features of the frozen backbone: K (F + 1) numbers.

    With `grid` or `at` the head also reads a map from inside, every channel of every cell: K (F + g^2 C + 1)
    numbers for a map of C channels. What is left of LION's gain beside the same reading is the states'.

    Args:
        reading: "fixed", or "auto": what of the next three is not given, `fit` chooses by cross-validation on
            the training images (`lion_fast.training.choosing`).
        at: the block (ViT) or stage (Swin, CNN), from 0, behind which a map is taken, or several; None: no
            map, with `grid` `map_place`.
        grid: cells along each side of a map; None: 4.
        pooled: whether the head reads the pooled features; None: it does.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> probe = Probe(load_backbone("resnet10t", pretrained=False), num_classes=10)
    >>> probe.num_trainable(), probe.num_trainable(head=True)
    (0, 5130)
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        reading: str = "fixed",
        at: int | Sequence[int] | None = None,
        grid: int | None = None,
        pooled: bool | None = None,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        reads = grid is not None or pooled is not None
        self.take_reading(reading, at, grid, pooled, (map_place(self.backbone),) if reads else ())
        if self.reading.at:
            self.build()

    @classmethod
    def known_before(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get("reading") != "fixed" or options.get("at") != []:
            return dict(options)
        later = {"reading", "at", "pooled"}
        return {k: v for k, v in options.items() if k not in later} | {"grid": None}

    def build(self) -> None:
        self.output_end = Cells(*self.read_widths()) if self.reading.at else None
        width = self.backbone.pooled_width(self.pool)
        self.head = self.new_head(width if self.output_end is None else self.output_end.out_features)
