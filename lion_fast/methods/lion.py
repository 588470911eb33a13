"""LION: an equilibrium on maps from inside a frozen backbone, or (form="residual") a layer at each end.

Source: Wang et al., "LION: Implicit Vision Prompt Tuning", AAAI 2024, arXiv 2303.09992, as this project
reads it (docs/mathematics.md); the variant "states" is this project's own (docs/accuracy.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.pixel import PixelEnd
from lion_fast.equilibrium.solve import OPTIONS, SolveInfo, SolveOptions, takes_solve_options
from lion_fast.errors import OptionError, check_choice, check_whole
from lion_fast.methods.base import register
from lion_fast.methods.reading import WIDEST, Cells, ReadingModel, ReadOut, map_place, read

ENDS = ("input", "output")
VARIANTS = ("states", "residual")
FRONTS = ("map", "residual")
STATE_DIM = 32


class _Behind(nn.Module):
    """Output end and head alone; what the solver says goes where the model keeps it."""

    def __init__(self, end: ReadOut, head: nn.Linear, told: dict[str, SolveInfo]):
        super().__init__()
        self.end, self.head, self._told = end, head, told

    def forward(self, encoded: Tensor) -> Tensor:
        features, self._told["output"] = self.end(encoded, return_info=True)
        return self.head(features.to(self.head.weight.dtype))


@register("lion")
class LionModel(ReadingModel):
    """Maps of the frozen blocks -> one equilibrium -> head; or a layer at each end of the blocks.

    form="states", the default: the head reads the states of an equilibrium, cell by cell of one or two coarse
    maps from inside the backbone, and the backbone's own features (`ReadOut`). It trains R C + R^2 + R
    numbers for maps of C channels. Nothing in front of the output end is trained, so `fit` runs the
    backbone once over the images and no gradient passes through it. Which maps, in how many cells, beside the
    features or alone, and how many states: reading="auto" has `fit` choose it by cross-validation on the
    training images (`lion_fast.training.choosing`). The pooled features alone may be the best; then a linear
    head on them, normed, is all that is trained.

    form="residual", LION as its public text describes it: both ends are `LionLayer`s that add to tokens
    of the backbone's own widths (ViT tokens with position embedding and prefix tokens, Swin's channels-last
    maps, the last feature map of a CNN), and the head pools as the backbone does. One end of width D with
    state width R trains 2 R D + R^2 + R + D numbers (tied: no R^2).

    ends=("input", "output") of "states" means a front and a back map into one equilibrium, each with an
    injection of its own: z = phi(W z + A1 x_front + A2 x_back + b). With front="residual" the input end is
    instead a layer that adds to the tokens in front of the blocks, as in form="residual". On a CNN it works
    on pixels: `PixelEnd`, a convolutional equilibrium of `pixel_channels` channels, always free and in torch.

    Args:
        form: the variant, "states" or "residual".
        reading: "auto": what of `at`, `grid`, `pooled` and `state_dim` is not given, `fit` chooses; until
            then it is as with "fixed", where what is not given has its default. "states" only, and nothing is
            chosen beside a residual input end.
        state_dim: state width R; None: 32.
        ends: "input", "output" or both; None: the output end alone for "states", both for "residual".
        front: what the input end of "states" is, "map" or "residual"; None: "map" beside an output end.
        at: the block (ViT) or stage (Swin, CNN), from 0, behind which "states" takes its map, or several,
            or an empty list for the pooled features alone; None: `map_place`, a third of the way through a
            ViT, and with both ends the last place too.
        grid: cells of a map along each side, more than it has are filled by repeating; None: 4.
        pooled: whether the head reads the pooled features too; None: it does.
        recurrence: "free" or "tied" ("residual" only).
        activation: None: tanh for "states", relu for "residual".
        gamma, damping, max_iter, tol, backward, neumann_terms, backend, on_failure: see `LionLayer`.
        pixel_channels: channels of a CNN's input end.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> LionModel(vit, num_classes=10, state_dim=16).num_trainable()
    3344
    >>> LionModel(vit, num_classes=10, state_dim=16, form="residual").num_trainable()
    13216
    """

    @takes_solve_options()
    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        form: str = "states",
        reading: str = "auto",
        state_dim: int | None = None,
        ends: str | Sequence[str] | None = None,
        front: str | None = None,
        at: int | Sequence[int] | None = None,
        grid: int | None = None,
        pooled: bool | None = None,
        recurrence: str = "free",
        activation: str | None = None,
        gamma: float = 0.8,
        pixel_channels: int = 8,
        **options,
    ):
        check_choice("form", form, VARIANTS)
        states = form == "states"
        if states and recurrence != "free":
            raise OptionError(
                f'recurrence {recurrence!r} needs form="residual": states have no read-out to tie'
            )
        solve = SolveOptions(**{name: options.pop(name) for name in OPTIONS if name in options})
        super().__init__(backbone, num_classes, **options)
        backbone = self.backbone
        ends = (("output",) if states else ENDS) if ends is None else ends
        ends = tuple(ends) if isinstance(ends, (tuple, list)) else (ends,)
        if not ends or any(end not in ENDS for end in ends) or len(set(ends)) < len(ends):
            raise OptionError(f'ends must be "input", "output" or both; got {ends!r}')
        if front is None:
            front = "map" if states and "output" in ends else "residual"
        check_choice("front", front, FRONTS)
        if front == "map" and not (states and "output" in ends):
            raise OptionError('front="map" needs form="states" and the output end')
        self.form, self.has_states = form, states and "output" in ends
        adds = "input" in ends and front == "residual"
        place = map_place(backbone)
        both = "input" in ends and front == "map"
        default = (place, len(backbone.map_widths) - 1) if both else (place,)
        reading = "fixed" if adds else reading
        if state_dim is not None:
            check_whole("state_dim", state_dim, most=WIDEST)
        self.take_reading(reading, at, grid, pooled, default, state_dim=state_dim)
        if not self.has_states:
            self.open = ()
            self.record(at=at, grid=self.reading.grid)
        check_whole("pixel_channels", pixel_channels, most=WIDEST)
        self.both = both
        if activation is None:
            activation = "tanh" if states else "relu"
        solve = {"activation": activation, "gamma": gamma, **asdict(solve)}
        self.state_dim, self.solve = state_dim or STATE_DIM, solve
        self.record(form=form, ends=ends, front=front, recurrence=recurrence)
        self.record(pixel_channels=pixel_channels, **solve)
        self.record(state_dim=None if "state_dim" in self.open else self.state_dim)
        self.input_end: nn.Module | None = None
        layer = {**solve, "state_dim": self.state_dim}
        if adds:
            if backbone.family == "cnn":
                own = {name: value for name, value in solve.items() if name != "backend"}
                self.input_end = PixelEnd(backbone.width_in, pixel_channels, **own)
            else:
                self.input_end = LionLayer(backbone.width_in, recurrence=recurrence, **layer)
        if "output" in ends and not states:
            self.output_end = LionLayer(backbone.width_out, recurrence=recurrence, **layer)
        self._info: dict[str, SolveInfo] = {}
        if self.has_states:
            self.build()

    @property
    def grid(self) -> int:
        """Cells of a map along each side."""
        return self.reading.grid

    @property
    def at(self) -> int | tuple[int, ...] | None:
        """The place that "states" reads, or the places; None where it reads none."""
        if not self.has_states:
            return None
        return self.reading.at[0] if len(self.reading.at) == 1 else self.reading.at

    def build(self) -> None:
        widths = self.read_widths()
        if self.reading.at:
            self.output_end = ReadOut(*widths[:3], self.state_dim, widths[3], **self.solve)
        else:
            self.output_end = Cells(*widths)
        self.head = self.new_head(self.output_end.out_features)

    def settle(self, chosen: Mapping[str, Any], seed: int) -> None:
        self.state_dim = chosen.get("state_dim") or self.state_dim
        check_whole("state_dim", self.state_dim, most=WIDEST)
        self.record(state_dim=self.state_dim)
        super().settle({name: value for name, value in chosen.items() if name != "state_dim"}, seed)

    @classmethod
    def known_before(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(options)
        adds = found.get("form") == "residual" or found.get("front") == "residual"
        if len(found.get("ends") or ()) != 2 or adds:
            found.pop("front", None)
        else:
            found["front"] = "map"
        if adds or found.get("reading") == "fixed":
            found.pop("reading", None)
            if found.get("pooled") in (None, True):
                found.pop("pooled", None)
        else:
            found["reading"] = "auto"
        return found

    def encode(self, images: Tensor) -> Tensor:
        x = self._end("input", self.backbone.enter(images))
        if self.has_states:
            return read(self.backbone, x, self.reading, self.pool)
        return self.backbone.pool(self._end("output", self.backbone.body(x)), self.pool)

    def reads_backbone(self) -> bool:
        return self.has_states and self.input_end is None

    def encoding(self) -> tuple:
        if self.reads_backbone():
            return super().encoding()
        return (type(self).encode, self.pool, self.form, self.reading)

    def behind(self) -> nn.Module:
        if isinstance(self.output_end, ReadOut):
            return _Behind(self.output_end, self.head, self._info).train(self.training)
        return super().behind() if self.has_states else self.head

    def features(self, images: Tensor) -> Tensor:
        encoded = self.encode(images)
        if isinstance(self.output_end, ReadOut):
            return self._end("output", encoded)
        return self.output_end(encoded) if self.has_states else encoded

    def _end(self, name: str, x: Tensor) -> Tensor:
        end = self.input_end if name == "input" else self.output_end
        if end is None:
            return x
        x, info = end(x, return_info=True)
        self._info[name] = info  # device tensors without a graph: reading them is what synchronises
        return x

    def diagnostics(self) -> dict[str, float]:
        """Per end, of the last forward: mean and largest iterations, worst residual, share converged.

        After a backward also the adjoint solve's worst residual. Empty before the first forward.
        """
        told: dict[str, float] = {}
        for name, info in self._info.items():
            summary = info.summary()
            for key in ("iterations", "max_iterations", "residual", "converged"):
                told[f"{name}_{key}"] = float(summary[key])
            if info.backward is not None:
                told[f"{name}_backward_residual"] = float(info.backward.summary()["residual"])
        return told
