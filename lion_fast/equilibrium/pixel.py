"""The convolutional equilibrium at the input end of a CNN, and a certified bound of a convolution's norm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.equilibrium.contraction import scale_within
from lion_fast.equilibrium.layer import READ_OUT_STD, hint
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.solve import (
    OPTIONS,
    SolveInfo,
    SolveOptions,
    Solving,
    apply_policy,
    check_tensor,
    takes_solve_options,
)
from lion_fast.equilibrium.solvers import solve_implicit
from lion_fast.errors import check_choice, check_gamma, check_whole
from lion_kernels.reference import ACTIVATIONS, flag_rows

# Frequencies per dimension above which the torus is sampled: a trigonometric polynomial of degree d exceeds
# its largest sample of n by at most 1 / cos(pi d / n), 0.5 % per dimension at 3 x 3.
SAMPLES = 32
# Squarings of each frequency's Gram matrix: at most c^(1/256) above the norm, 0.8 % at 8 channels.
SQUARINGS = 6
MARGIN = 1e-4


def conv_norm_bound(weight: Tensor, height: int, width: int) -> Tensor:
    """An upper bound of the norm of z -> conv2d(z, weight, padding="same") on maps of height x width.

    weight (c_out, c_in, k, k), k odd; a scalar in float32 or float64, differentiable, never too small.

    A zero-padded convolution is a compression of the circular one on a torus of (height + k - 1) x
    (width + k - 1), whose singular values are those of the c_out x c_in matrices that the kernel has at the
    torus' frequencies. On large maps the frequencies are sampled, with the margin of a trigonometric
    polynomial between its samples; the norm of each matrix is bounded by Gram squaring.

    >>> identity = torch.zeros(1, 1, 3, 3)
    >>> identity[0, 0, 1, 1] = 1
    >>> bool(1 <= conv_norm_bound(identity, 8, 8) < 1.001)
    True
    """
    check_tensor(weight, "weight")
    if weight.ndim != 4 or any(k % 2 == 0 for k in weight.shape[2:]) or min(*weight.shape, height, width) < 1:
        raise ValueError(
            f"a bound needs a weight (c_out, c_in, k, k) with k odd and a map of at least 1 x 1; got "
            f"{tuple(weight.shape)} and {height} x {width}"
        )
    weight = weight if weight.dtype == torch.float64 else weight.float()
    tiny = torch.finfo(weight.dtype).tiny
    with torch.autocast(weight.device.type, enabled=False):
        found = weight.detach().abs().amax()
        largest = found.clamp_min(tiny)
        (rows, row_margin), (columns, column_margin) = (
            _waves(size, k, weight) for size, k in zip((height, width), weight.shape[2:], strict=True)
        )
        # a real kernel's other half of the columns are complex conjugates
        columns = columns[: columns.shape[0] // 2 + 1]
        S = torch.einsum("oihw,ah,bw->aboi", (weight / largest).to(rows.dtype), rows, columns)
        S = S.flatten(0, 1)
        G = S.mH @ S if S.shape[1] >= S.shape[2] else S @ S.mH
        log_norm = torch.zeros(G.shape[0], dtype=weight.dtype, device=weight.device)
        for k in range(SQUARINGS + 1):
            # not the square root of a complex sum: at zero its gradient would be NaN
            size = torch.view_as_real(G).square().sum((1, 2, 3)).clamp_min(tiny).sqrt()
            log_norm = log_norm + size.log() / 2 ** (k + 1)
            if k < SQUARINGS:
                G = G / size[:, None, None]
                G = G @ G
        bound = log_norm.exp().amax() * largest * (row_margin * column_margin * (1 + MARGIN))
    return bound.where(found != 0, 0.0)


def _waves(size: int, k: int, like: Tensor) -> tuple[Tensor, float]:
    """exp(i theta j) at the torus' frequencies theta, or at samples, for taps j (n, k); and the margin."""
    torus, degree = size + k - 1, (k - 1) // 2
    samples = SAMPLES * max(degree, 1)
    n, margin = (torus, 1.0) if torus <= samples else (samples, 1 / math.cos(math.pi * degree / samples))
    theta = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    angle = theta[:, None] * torch.arange(-degree, degree + 1, dtype=torch.float64)
    dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(like.device, dtype), margin


class PixelEnd(Solving, Masked):
    """out = x + conv1x1(z; V) + c with the equilibrium z = phi(conv3x3(z; Wh) + conv3x3(x; U) + b).

    x (B, `in_channels`, H, W), out the same; the state z is (B, `channels`, H, W). Wh is W scaled down where
    needed so that Lip(phi) times the convolution's norm at the true H x W is at most `gamma`, for certain.
    Parameters U (c, 3, 3, 3), W (c, c, 3, 3), b (c), V (3, c, 1, 1), c (3): 9 c^2 + 31 c + 3 numbers on RGB.
    Options as `LionLayer` but `backend`: it runs in torch. x is of any float dtype, in which the convolutions
    are. The injection and Wh are computed once per solve. The convolutions are the library's: an image alone
    and in a batch may differ by their rounding. In the record a token is an image.

    Raises OptionError on an option outside its range, ValueError or TypeError on input that does not fit.

    >>> end = PixelEnd(3, channels=4)
    >>> end(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 3, 16, 16])
    """

    matrices = ("U", "W", "V")
    _hint = hint

    @takes_solve_options(*(name for name in OPTIONS if name != "backend"))
    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 8,
        *,
        activation: str = "relu",
        gamma: float = 0.8,
        **solve,
    ):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.solve = SolveOptions(**solve)
        check_whole("in_channels", in_channels)
        check_whole("channels", channels)
        check_gamma(gamma)
        self.activation, self.gamma = activation, gamma
        self.U = nn.Parameter(torch.empty(channels, in_channels, 3, 3))
        self.W = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.b = nn.Parameter(torch.empty(channels))
        self.V = nn.Parameter(torch.empty(in_channels, channels, 1, 1))
        self.c = nn.Parameter(torch.empty(in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U and W normal with variance 1 / fan-in, V normal and small as a `LionLayer`'s, b and c zero."""
        for weight in (self.U, self.W):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        nn.init.normal_(self.V, std=READ_OUT_STD)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)

    def recurrence_kernel(self, height: int, width: int) -> Tensor:
        """Wh (c, c, 3, 3), a contraction of rate at most gamma on maps of height x width."""
        W = self.masked("W")
        norm = conv_norm_bound(W, height, width)
        limit = self.gamma / ACTIVATIONS[self.activation].lipschitz
        whole = W.to(norm.dtype)
        scale = scale_within(norm, limit, W.dtype, lambda: whole.abs().sum(), W.numel())
        return (whole * scale).to(W.dtype)

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        check_tensor(x)
        channels = self.U.shape[1]
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"x must be (B, {channels}, H, W) for this layer; it has shape {tuple(x.shape)}")
        phi = ACTIVATIONS[self.activation].phi
        weights = self.masked("U"), self.masked("V"), self.recurrence_kernel(*x.shape[2:])
        U, V, kernel = (t.to(x.dtype) for t in weights)
        q = F.conv2d(x, U, self.b.to(x.dtype), padding=1)

        def f(z: Tensor, q: Tensor) -> Tensor:
            return phi(F.conv2d(z, kernel, padding=1) + q)

        z, info = solve_implicit(
            f, q, torch.zeros_like(q), self.solve, self.solve.terms, return_info=return_info, hint=self._hint
        )
        out = x + F.conv2d(z, V, self.c.to(x.dtype))
        for result in (q, out):
            info.residual = flag_rows(info.residual, result.detach().flatten(1))
        apply_policy(info, self.on_failure, self._hint)
        return (out, info) if return_info else out
