"""The frozen backbone made cheaper for every method alike: memory, folded norms, precision.

What a frozen pre-norm ViT block keeps for a backward, in rows of width D per token, and with `memory="save"`:

| kept                      | plain | save | why                                                         |
| ------------------------- | ----- | ---- | ----------------------------------------------------------- |
| input of the first norm   | 1     | 1    | the frozen projection behind the norm keeps nothing          |
| q, k, v of the attention  | 3     | 3    |                                                             |
| output of the attention   | 1     | 1    |                                                             |
| input of the second norm  | 1     | 0    | first input + projected attention: one product of D^2 again  |
| input of the activation   | 4     | 0    | the norm and the first linear again: 4 D^2                   |

The 5 D^2 are about a fifth of the products of a block's forward and backward (24 D^2 and the attention).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Attention, Block, LayerScale, ResPostBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lion_fast.backbones import fp8
from lion_fast.backbones.at_work import works_for_first
from lion_fast.errors import BackboneError, OptionError, check_bool, check_choice

MEMORY = ("plain", "save")
PRECISIONS = ("fp32", "bf16", "fp8")
# Methods that see of a block nothing but norm -> linear as one function; the others read or train in between.
FOLDABLE = ("e2vpt", "lion", "probe", "vfpt", "vpt")
# Methods whose parameters are the backbone's own, which an optimiser moves too little in bfloat16.
OWNERS = ("bitfit", "full", "lntune", "partial")
# Rows recomputed at once in a backward: what is alive then is 12 D wide, beside 5 D per block for all rows.
CHUNK_ROWS = 4096
# Called with every tensor that a recomputation keeps outside of autograd's sight; for those who count memory.
KEEPS: list[Callable[[Tensor], None]] = []


def apply(backbone, *, memory: str = "plain", fold: bool = False, precision: str = "fp32") -> None:
    """Change a `Backbone` in place; the hash of its weights stays that of the weights as loaded.

    memory: "save" recomputes in the backward what is cheap (ViT and Swin; see the module's table).
    fold: put the affine part of each block's norms, and its layer scales, into the linears beside them
        (ViT). The function stays the same to rounding.
    precision: "bf16" holds the frozen weights in bfloat16; "fp8" also computes the blocks' linears in 8 bits,
        on a GPU that can. A method's own parameters stay float32.

    Raises `OptionError` on an unknown value, `BackboneError` where the backbone or the hardware cannot.
    """
    check_choice("memory", memory, MEMORY)
    check_choice("precision", precision, PRECISIONS)
    check_bool("fold", fold)
    if memory == "plain" and not fold and precision == "fp32":
        return
    sha256 = backbone.weights_sha256  # before anything changes
    if fold and not backbone.folded:
        fold_norms(backbone)
    if precision != "fp32" and backbone.precision == "fp32":
        if precision == "fp8":
            fp8.check_available(backbone)
        hold(backbone, torch.bfloat16)
        if precision == "fp8":
            fp8.convert(backbone)
        backbone.precision = precision
    if memory == "save" and backbone.memory == "plain":
        save_memory(backbone)
    backbone.name_weights(sha256)


def check_method(backbone, method: str) -> None:
    """Raise `OptionError` if `method` reads or trains what is folded, or trains what is held in bfloat16."""
    if backbone.precision != "fp32" and method in OWNERS:
        raise OptionError(
            f"method {method} trains weights of {backbone.name}; precision={backbone.precision!r} holds them "
            "in bfloat16, where small steps are lost. Load the backbone in fp32 and train under autocast "
            "(mixed_precision)"
        )
    if backbone.folded and method not in FOLDABLE:
        raise OptionError(
            f"method {method} reads or trains what fold=True has put together (the norms, their linears or "
            f"the layer scales of {backbone.name}); load the backbone without fold. Methods that allow it: "
            f"{', '.join(FOLDABLE)}"
        )


# -- less kept for the backward


def save_memory(backbone) -> None:
    """Make every block of a ViT or Swin keep less; in place."""
    saving = {
        Block: SavingBlock,
        ResPostBlock: SavingResPostBlock,
        SwinTransformerBlock: SavingSwinBlock,
        SwinTransformerV2Block: SavingSwinV2Block,
    }
    blocks = [m for m in backbone.model.modules() if type(m) in saving]
    if backbone.family == "vit" and len(blocks) < len(backbone.blocks) or not blocks:
        told = type(backbone.blocks[0]).__name__ + " blocks" if backbone.family == "vit" else backbone.family
        raise BackboneError(
            f'memory="save" knows timm\'s ViT and Swin blocks; {backbone.name} has {told}. Leave it out'
        )
    for block in blocks:
        block.__class__ = saving[type(block)]
        if type(block.mlp) is Mlp:
            block.mlp.__class__ = SavingMlp
    backbone.memory = "save"


class SavingMlp(Mlp):
    """timm's Mlp that keeps its input instead of the wider input of its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return again(self, super().forward, x)


class SavingBlock(Block):
    """timm's Block that keeps its input, q, k, v and the attention's output: 5 D a token, not 10 D."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and plain_attention(self.attn):
            return tail(self, x, heads(self.attn, self.norm1(x)))
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return again(self, lambda x: x + self.ls2(run_mlp(self.mlp, self.norm2(x))), x)


class SavingResPostBlock(ResPostBlock):
    """timm's ResPostBlock that keeps its input, q, k, v and the attention's output."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and plain_attention(self.attn):
            return tail(self, x, heads(self.attn, x))
        x = x + self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        return again(self, lambda x: x + self.norm2(run_mlp(self.mlp, x)), x)


class SavingSwinBlock(SwinTransformerBlock):
    """timm's SwinTransformerBlock that keeps the input of its second half instead of the activation's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attn(self.norm1(x))
        return again(self, lambda x: x + run_mlp(self.mlp, self.norm2(x)), x)


class SavingSwinV2Block(SwinTransformerV2Block):
    """timm's SwinTransformerV2Block that keeps the input of its second half instead of the activation's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self._attn(x))
        return again(self, lambda x: x + self.norm2(run_mlp(self.mlp, x)), x)


def again(module: nn.Module, function: Callable, *tensors: Tensor) -> Tensor:
    """function(*tensors), computed again in the backward instead of kept; `module` owns its parameters."""
    tracked = any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters())
    if not (torch.is_grad_enabled() and tracked):
        return function(*tensors)
    for keep in KEEPS:
        for t in tensors:
            keep(t)
    return checkpoint(function, *tensors, use_reentrant=False)


def run_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """An MLP inside a stretch that is recomputed as a whole: `SavingMlp` must not recompute within it."""
    if type(mlp) is SavingMlp and not _touched(mlp):
        return Mlp.forward(mlp, x)
    return mlp(x)


@works_for_first
def mlp_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What the second half of a ViT block adds to rows (..., D); a saving block keeps x alone for it."""
    post = isinstance(block, ResPostBlock)

    def branch(x: Tensor) -> Tensor:
        rows = run_mlp(block.mlp, x if post else block.norm2(x))
        return block.norm2(rows) if post else block.ls2(rows)

    return again(block, branch, x) if isinstance(block, (SavingBlock, SavingResPostBlock)) else branch(x)


def plain_attention(attn: nn.Module) -> bool:
    """Whether `heads` and the module's projection together are this attention, as it stands."""
    return type(attn) is Attention and not _touched(attn)


def heads(
    attn: Attention, x: Tensor, k_prefix: Tensor | None = None, v_prefix: Tensor | None = None
) -> Tensor:
    """timm's attention on rows (B, N, D) up to its projection; rows of K and V (h, P, D/h) in front."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if k_prefix is not None:
        # a view of qkv would keep the k and v that are copied here alive beside their copies; rows stay
        # outside of heads, since the attention's output is laid out as q is
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k = torch.cat([k_prefix.to(k.dtype).expand(batch, -1, -1, -1), k], 2)
        v = torch.cat([v_prefix.to(v.dtype).expand(batch, -1, -1, -1), v], 2)
    return attend(attn, x, q, k, v)


def attend(attn: nn.Module, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (B, h, N, d) on k and v, up to the output projection: rows (B, N, h d).

    x (B, N, D): the rows that q was made of, which the gate of a gated attention reads.
    """
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = getattr(attn, "norm", nn.Identity())(out)  # not in older timm
    gate = getattr(attn, "gate", None)
    return out if gate is None else out * gate(x).sigmoid()


def tail(block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """The rest of a ViT block behind its attention's heads: projection, residuals and MLP.

    x (B, N, D) is the block's input, rows (B, N, D) what `heads` gave. In a saving block nothing is kept
    beside the two.
    """
    if not isinstance(block, (SavingBlock, SavingResPostBlock)):
        return _tail(block, x, rows)
    if not _all_frozen(block) or torch.compiler.is_compiling():
        return again(block, lambda x, rows: _tail(block, x, rows), x, rows)
    if torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad):
        return _FrozenTail.apply(x, rows, block)
    return _tail(block, x, rows)


def _tail(block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    if isinstance(block, ResPostBlock):
        x = x + block.norm1(block.attn.proj_drop(block.attn.proj(rows)))
        return x + block.norm2(run_mlp(block.mlp, x))
    x = x + block.ls1(block.attn.proj_drop(block.attn.proj(rows)))
    return x + block.ls2(run_mlp(block.mlp, block.norm2(x)))


class _FrozenTail(torch.autograd.Function):
    """`tail` of a wholly frozen `Block`: keeps its inputs, whose storage norm and attention keep anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, block: nn.Module) -> Tensor:
        ctx.save_for_backward(x, rows)
        ctx.block = block
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        parts = [
            _tail(block, a, b) for a, b in zip(*(_chunks(t) for t in (x, rows)), strict=True)
        ]  # the activation is four times as wide as what goes out
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, rows = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        dx, drows = x.new_empty(x.shape), rows.new_empty(rows.shape)  # contiguous, whatever x is
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            chunks = zip(*(_chunks(t) for t in (x, rows, grad, dx, drows)), strict=True)
            for x_part, rows_part, grad_part, dx_part, drows_part in chunks:
                _tail_backward(ctx.block, x_part, rows_part, grad_part, dx_part, drows_part)
        return dx, drows, None


def _tail_backward(block, x: Tensor, rows: Tensor, grad: Tensor, dx: Tensor, drows: Tensor) -> None:
    mlp = block.mlp
    x, rows = x.detach().requires_grad_(), rows.detach().requires_grad_()
    with torch.enable_grad():
        z = x + block.ls1(block.attn.proj(rows))
        a = mlp.act(mlp.fc1(block.norm2(z)))
    scaled = grad * block.ls2.gamma if isinstance(block.ls2, LayerScale) else grad
    da = torch.matmul(scaled, mlp.fc2.weight)  # fc2 itself is not computed again: its gradient needs no input
    for part, found in zip((dx, drows), torch.autograd.grad([z, a], [x, rows], [grad, da]), strict=True):
        part.copy_(found)


def _chunks(t: Tensor) -> tuple[Tensor, ...]:
    return t.reshape(-1, t.shape[-1]).split(CHUNK_ROWS)


def _all_frozen(block: nn.Module) -> bool:
    """Whether `_tail_backward` describes what is behind the heads: timm's own modules, untouched, frozen."""
    if not isinstance(block, Block):
        return False
    attn, mlp = block.attn, block.mlp
    if type(mlp) is not SavingMlp or any(type(m) is not nn.Linear for m in (attn.proj, mlp.fc1, mlp.fc2)):
        return False
    if not all(isinstance(m, (nn.Identity, LayerScale)) for m in (block.ls1, block.ls2)):
        return False
    if not isinstance(mlp.norm, nn.Identity) or any(
        d.training for d in (attn.proj_drop, mlp.drop1, mlp.drop2)
    ):
        return False
    parts = (attn.proj, block.ls1, block.ls2, block.norm2, mlp, mlp.fc1, mlp.act, mlp.fc2)
    return not any(_touched(m) or any(p.requires_grad for p in m.parameters(False)) for m in parts)


def _touched(module: nn.Module) -> bool:
    """Whether somebody hooked the module or gave it another forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# -- folding


def fold_norms(backbone) -> None:
    """The affine parts of norms go into the linears behind them, layer scales into those before them.

    In place, computed in float64. `BackboneError` unless every block is timm's `Block` with layer norms.
    """
    if backbone.family != "vit" or not all(
        isinstance(block, Block) and type(block.attn) is Attention and isinstance(block.mlp, Mlp)
        for block in backbone.blocks
    ):
        raise BackboneError(
            "fold=True knows ViTs of timm's plain blocks (norm in front of attention and MLP); "
            f"{backbone.name} is not one. Leave the option out"
        )
    for block in backbone.blocks:
        attn, mlp = block.attn, block.mlp
        _fold_norm(block.norm1, [attn.qkv, *([attn.gate] if getattr(attn, "gate", None) is not None else [])])
        _fold_norm(block.norm2, [mlp.fc1])
        for scale, linear in (("ls1", attn.proj), ("ls2", mlp.fc2)):
            if isinstance(getattr(block, scale), LayerScale):
                _fold_scale(getattr(block, scale), linear)
                setattr(block, scale, nn.Identity())
    backbone.folded = True


@torch.no_grad()
def _fold_norm(norm: nn.Module, linears: list[nn.Linear]) -> None:
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        return
    for linear in linears:
        weight = linear.weight.double()
        if norm.bias is not None:
            shift = weight @ norm.bias.double()
            if linear.bias is None:
                linear.bias = nn.Parameter(shift.to(linear.weight.dtype), requires_grad=False)
            else:
                linear.bias.copy_(linear.bias.double() + shift)
        linear.weight.copy_(weight * norm.weight.double())
    norm.weight = norm.bias = None
    norm.elementwise_affine = False


@torch.no_grad()
def _fold_scale(scale: LayerScale, linear: nn.Linear) -> None:
    gamma = scale.gamma.double()
    linear.weight.copy_(linear.weight.double() * gamma[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() * gamma)


# -- precision


def hold(backbone, dtype: torch.dtype) -> None:
    """Hold the frozen weights in `dtype` and let layer norms work on rows of it, inside autocast too.

    Autocast would hand layer norms float32 copies of their rows, which then are what the backward keeps.
    """
    backbone.to(dtype)
    for module in backbone.model.modules():
        if type(module) in (nn.LayerNorm, LayerNorm):
            module.__class__ = HeldLayerNorm
            module.held = dtype


class HeldLayerNorm(nn.LayerNorm):
    """Layer norm in the dtype that the backbone is held in; statistics are float32 inside the kernel."""

    held: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.held))

    def _apply(self, fn: Callable, recurse: bool = True):
        self.held = fn(torch.empty(0, dtype=self.held)).dtype  # without an affine part no tensor tells
        return super()._apply(fn, recurse)
