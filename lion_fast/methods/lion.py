"""LION: an equilibrium layer in front of a frozen backbone and one behind it.

Source: Wang et al., "LION: Implicit Vision Prompt Tuning", AAAI 2024, arXiv 2303.09992, as this project
reads it (docs/mathematics.md).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lion_fast.errors import OptionError
from lion_fast.layer import LionLayer
from lion_fast.methods.base import TunedModel, register
from lion_fast.methods.pixel import PixelEnd
from lion_fast.solvers import SolveInfo

ENDS = ("input", "output")


@register("lion")
class LionModel(TunedModel):
    """enter -> input end -> frozen blocks and norm -> output end -> pooling -> head.

    Both ends are `LionLayer`s on token rows of the backbone's own widths: ViT tokens with position embedding
    and prefix tokens, Swin's channels-last maps, the last feature map of a CNN. A CNN's input end works on
    pixels instead: `PixelEnd`, a convolutional equilibrium of `pixel_channels` channels, always free and in
    torch. One end of width D with state width R trains 2 R D + R^2 + R + D numbers (tied: no R^2).

    Args:
        state_dim: state width R.
        ends: ("input", "output"), or one of them.
        recurrence, activation, gamma, damping, max_iter, tol, backward, neumann_terms, backend, on_failure:
            see `LionLayer`.
        pixel_channels: channels of a CNN's input end.
        pool, head_bias: see `TunedModel`.

    >>> from lion_fast import load_backbone
    >>> vit = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> LionModel(vit, num_classes=10, state_dim=16).num_trainable()
    13216
    """

    def __init__(
        self,
        backbone,
        num_classes: int,
        *,
        state_dim: int = 32,
        ends: str | Sequence[str] = ENDS,
        recurrence: str = "free",
        activation: str = "relu",
        gamma: float = 0.8,
        damping: float = 1.0,
        max_iter: int = 50,
        tol: float | None = None,
        backward: str = "neumann",
        neumann_terms: int = 8,
        backend: str = "auto",
        on_failure: str = "ignore",
        pixel_channels: int = 8,
        **options,
    ):
        super().__init__(backbone, num_classes, **options)
        backbone = self.backbone
        ends = tuple(ends) if isinstance(ends, (tuple, list)) else (ends,)
        if not ends or set(ends) - set(ENDS) or len(set(ends)) < len(ends):
            raise OptionError(f'ends must be "input", "output" or both; got {ends!r}')
        solve = {
            "activation": activation,
            "gamma": gamma,
            "damping": damping,
            "max_iter": max_iter,
            "tol": tol,
            "backward": backward,
            "neumann_terms": neumann_terms,
            "on_failure": on_failure,
        }
        layer = {**solve, "state_dim": state_dim, "recurrence": recurrence, "backend": backend}
        self.record(ends=ends, pixel_channels=pixel_channels, **layer)
        self.input_end: nn.Module | None = None
        self.output_end: nn.Module | None = None
        if "input" in ends:
            if backbone.family == "cnn":
                self.input_end = PixelEnd(backbone.width_in, pixel_channels, **solve)
            else:
                self.input_end = LionLayer(backbone.width_in, **layer)
        if "output" in ends:
            self.output_end = LionLayer(backbone.width_out, **layer)
        self._info: dict[str, SolveInfo] = {}

    def features(self, images: Tensor) -> Tensor:
        x = self._end("input", self.input_end, self.backbone.enter(images))
        y = self._end("output", self.output_end, self.backbone.body(x))
        return self.backbone.pool(y, self.pool)

    def _end(self, name: str, layer: nn.Module | None, x: Tensor) -> Tensor:
        if layer is None:
            return x
        x, info = layer(x, return_info=True)
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
