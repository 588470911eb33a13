"""LION: equilibria on a map from inside a frozen backbone, or (form="residual") a layer at each end.

Source: Wang et al., "LION: Implicit Vision Prompt Tuning", AAAI 2024, arXiv 2303.09992, as this project
reads it (docs/mathematics.md); the variant "states" is this project's own (docs/accuracy.md).
"""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor, nn

from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.pixel import PixelEnd
from lion_fast.equilibrium.solve import OPTIONS, SolveInfo, SolveOptions, takes_solve_options
from lion_fast.errors import OptionError, check_choice, check_whole
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.read_out import FINEST, GRID, WIDEST, ReadOut, features_and_cells, map_place

ENDS = ("input", "output")
VARIANTS = ("states", "residual")


class _Behind(nn.Module):
    """Output end and head alone; what the solver says goes where the model keeps it."""

    def __init__(self, end: ReadOut, head: nn.Linear, told: dict[str, SolveInfo]):
        super().__init__()
        self.end, self.head, self._told = end, head, told

    def forward(self, encoded: Tensor) -> Tensor:
        features, self._told["output"] = self.end(encoded, return_info=True)
        return self.head(features.to(self.head.weight.dtype))


@register("lion")
class LionModel(TunedModel):
    """enter -> input end -> frozen blocks and norm -> output end -> head.

    form="states", the default: the head reads the backbone's own features and, cell by cell of a coarse
    map from inside the backbone, the states of an equilibrium (`ReadOut`). It trains
    R C + R^2 + R numbers for a map of C channels. Nothing in front of the output end is trained unless
    `ends` asks for it, so `fit` runs the backbone once over the images and no gradient passes through it.

    form="residual", LION as its public text describes it: both ends are `LionLayer`s that add to tokens
    of the backbone's own widths (ViT tokens with position embedding and prefix tokens, Swin's channels-last
    maps, the last feature map of a CNN), and the head pools as the backbone does. One end of width D with
    state width R trains 2 R D + R^2 + R + D numbers (tied: no R^2).

    The input end is the same in both variants. On a CNN it works on pixels: `PixelEnd`, a convolutional
    equilibrium of `pixel_channels` channels, always free and in torch.

    Args:
        form: the variant, "states" or "residual".
        state_dim: state width R.
        ends: "input", "output" or both; None: the output end alone for "states", both for "residual".
        at: the block (ViT) or stage (Swin, CNN) behind which "states" takes its map, from 0; None:
            `map_place`, a third of the way through a ViT.
        grid: cells of that map along each side; more than the map has are filled by repeating.
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
        state_dim: int = 32,
        ends: str | Sequence[str] | None = None,
        at: int | None = None,
        grid: int = GRID,
        recurrence: str = "free",
        activation: str | None = None,
        gamma: float = 0.8,
        pixel_channels: int = 8,
        head_bias: bool = True,
        **options,
    ):
        check_choice("form", form, VARIANTS)
        states = form == "states"
        if states and recurrence != "free":
            raise OptionError(
                f'recurrence {recurrence!r} needs form="residual": states have no read-out to tie'
            )
        solve = SolveOptions(**{name: options.pop(name) for name in OPTIONS if name in options})
        super().__init__(backbone, num_classes, head_bias=head_bias, **options)
        backbone = self.backbone
        ends = (("output",) if states else ENDS) if ends is None else ends
        ends = tuple(ends) if isinstance(ends, (tuple, list)) else (ends,)
        if not ends or any(end not in ENDS for end in ends) or len(set(ends)) < len(ends):
            raise OptionError(f'ends must be "input", "output" or both; got {ends!r}')
        reads_states = states and "output" in ends
        if activation is None:
            activation = "tanh" if states else "relu"
        solve = {"activation": activation, "gamma": gamma, **asdict(solve)}
        layer = {**solve, "state_dim": state_dim}
        check_whole("grid", grid, most=FINEST)
        check_whole("state_dim", state_dim, most=WIDEST)
        check_whole("pixel_channels", pixel_channels, most=WIDEST)
        if at is not None:
            check_whole("at", at, 0, len(backbone.map_widths) - 1)
        self.form, self.grid = form, grid
        self.at = map_place(backbone) if at is None and reads_states else at
        self.record(form=form, ends=ends, at=self.at, grid=grid, recurrence=recurrence)
        self.record(pixel_channels=pixel_channels, **layer)
        self.input_end: nn.Module | None = None
        self.output_end: nn.Module | None = None
        if "input" in ends:
            if backbone.family == "cnn":
                check_whole("pixel_channels", pixel_channels)
                own = {name: value for name, value in solve.items() if name != "backend"}
                self.input_end = PixelEnd(backbone.width_in, pixel_channels, **own)
            else:
                self.input_end = LionLayer(backbone.width_in, recurrence=recurrence, **layer)
        if "output" in ends and not states:
            self.output_end = LionLayer(backbone.width_out, recurrence=recurrence, **layer)
        if reads_states:
            widths = backbone.map_widths
            self.output_end = ReadOut(backbone.pooled_width(self.pool), grid * grid, widths[self.at], **layer)
            self.head = self.new_head(self.output_end.out_features, head_bias)
        self._info: dict[str, SolveInfo] = {}

    def encode(self, images: Tensor) -> Tensor:
        x = self._end("input", self.backbone.enter(images))
        if isinstance(self.output_end, ReadOut):
            y, maps = self.backbone.body_and_map(x, self.at)
            return features_and_cells(self.backbone.pool(y, self.pool), maps, self.grid)
        return self.backbone.pool(self._end("output", self.backbone.body(x)), self.pool)

    def encoding(self) -> tuple:
        return (*super().encoding(), self.form, self.at, self.grid)

    def behind(self) -> nn.Module:
        if isinstance(self.output_end, ReadOut):
            return _Behind(self.output_end, self.head, self._info).train(self.training)
        return self.head

    def features(self, images: Tensor) -> Tensor:
        encoded = self.encode(images)
        return self._end("output", encoded) if isinstance(self.output_end, ReadOut) else encoded

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
