"""Frozen linears in 8-bit floating point: weights scaled per output, rows scaled as they come.

y = x W^T + b with x and W rounded to e4m3 (4 bits exponent, 3 bits mantissa), a scale per row of x and per
row of W, products summed in float32 and given back in bfloat16. The backward multiplies the rounded gradient
with the same rounded W, so it is the gradient of what the forward computed, up to rounding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lion_fast.errors import BackboneError

FP8 = getattr(torch, "float8_e4m3fn", None)
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of both widths, for the tensor cores


class Error(NamedTuple):
    """How far approximate features are from exact ones."""

    relative: float  # |a - b| / |b| over everything
    sqnr_db: float  # the same in decibel
    cosine: float  # smallest over the images


def why_not(device: torch.device | str | None = None) -> str | None:
    """The reason why frozen linears cannot run in fp8 here, or None."""
    if FP8 is None or not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no scaled fp8 matrix product"
    if not torch.cuda.is_available():
        return "there is no CUDA device; fp8 needs a GPU of compute capability 9.0 (Hopper) or newer"
    if device is not None and torch.device(device).type != "cuda":
        return f"the tensors are on {torch.device(device).type}; fp8 needs a GPU of capability 9.0 or newer"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}; fp8 needs 9.0 (Hopper) or newer"
    return None


def check_available(backbone) -> None:
    """Raise `BackboneError` with the reason where precision="fp8" cannot serve this backbone here."""
    reason = why_not()
    if reason is None and not linears(backbone):
        reason = f"{backbone.name} has no ViT blocks with linears of widths that are multiples of {MULTIPLE}"
    if reason is not None:
        raise BackboneError(f'precision="fp8" cannot run: {reason}. Use precision="bf16"')


def linears(backbone) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linears of a ViT's blocks that fp8 can serve: (parent, name, linear)."""
    found = []
    for block in backbone.model.modules():
        if isinstance(block, (Block, ResPostBlock)):
            for parent in (block.attn, block.mlp):
                for name, child in parent.named_children():
                    wide = type(child) is nn.Linear and not any(n % MULTIPLE for n in child.weight.shape)
                    if wide:
                        found.append((parent, name, child))
    return found


def convert(backbone, *, emulate: bool = False) -> None:
    """Replace those linears by `Fp8Linear`, in place."""
    for parent, name, linear in linears(backbone):
        setattr(parent, name, Fp8Linear(linear, emulate=emulate))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) to e4m3 and the float32 scale (..., 1) that brings them back.

    >>> rows, scale = quantise(torch.tensor([[1.0, -2.0, 0.5]]))
    >>> (rows.float() * scale).tolist()
    [[1.0, -2.0, 0.5]]
    """
    scale = x.detach().abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


class Fp8Linear(nn.Module):
    """A frozen linear in fp8. rows (..., K) of any float dtype to (..., N) in bfloat16.

    emulate=True rounds alike and multiplies in float32, on any device: for measuring the error. Without it a
    device that has no fp8 raises `BackboneError`. Two copies of the weight are held, 1 byte a number each:
    the forward's and the backward's products want it in different orders.
    """

    def __init__(self, linear: nn.Linear, *, emulate: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.emulate = linear.in_features, linear.out_features, emulate
        rows, scale = quantise(linear.weight.detach())
        # as bytes: a cast of the module to another float type must not touch them
        self.register_buffer("bytes", rows.view(torch.uint8))
        self.register_buffer("bytes_t", rows.t().contiguous().view(torch.uint8))
        self.register_buffer("scale_bytes", scale[:, 0].contiguous().view(torch.int32))
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias)

    @property
    def scale(self) -> Tensor:
        """Float32 scale of each output (N)."""
        return self.scale_bytes.view(torch.float32)

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, (N, K) in bfloat16 (a product of 8 bits and a scale, rounded)."""
        return (self.bytes.view(FP8).float() * self.scale[:, None]).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if not self.emulate and x.device.type != "cuda":
            raise BackboneError(f"a backbone of precision fp8 cannot run: {why_not(x.device)}")
        with torch.autocast(x.device.type, enabled=False):
            return _Product.apply(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, emulate={self.emulate}"


class _Product(torch.autograd.Function):
    """Keeps nothing but the frozen weight: the input is not needed for its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: Fp8Linear) -> Tensor:
        ctx.linear, ctx.dtype = linear, x.dtype
        rows = x.reshape(-1, x.shape[-1])
        out = _multiply(rows, linear.bytes, linear.scale, linear.bias, linear.emulate)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        linear = ctx.linear
        rows = grad.reshape(-1, grad.shape[-1]).float() * linear.scale
        ones = torch.ones(linear.in_features, device=grad.device)
        dx = _multiply(rows, linear.bytes_t, ones, None, linear.emulate)
        return dx.view(*grad.shape[:-1], -1).to(ctx.dtype), None


def _multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, emulate: bool) -> Tensor:
    """Rows (M, K) times bytes (N, K)^T, in bfloat16."""
    rows, row_scale = quantise(x)
    if emulate:
        out = F.linear(rows.float(), weight.view(FP8).float()) * row_scale * scale
        return (out if bias is None else out + bias.float()).to(torch.bfloat16)
    return torch._scaled_mm(
        rows,
        weight.view(FP8).t(),
        scale_a=row_scale,
        scale_b=scale[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@torch.no_grad()
def error(approximate: Tensor, exact: Tensor) -> Error:
    """The error of features (B, F) against exact ones of the same images.

    >>> error(torch.tensor([[1.0, 1.1]]), torch.tensor([[1.0, 1.0]])).relative < 0.08
    True
    """
    a, b = approximate.double(), exact.double()
    relative = ((a - b).norm() / b.norm()).item()
    sqnr = float("inf") if relative == 0 else (-20 * torch.tensor(relative).log10()).item()
    return Error(relative, sqnr, F.cosine_similarity(a, b, dim=-1).min().item())
