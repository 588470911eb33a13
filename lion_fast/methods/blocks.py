"""Methods that write the frozen ViT block anew, and the parts they put their own terms beside.

A timm block is x + attention branch, then x + MLP branch. `Block` norms what enters a branch and scales
what leaves it (LayerScale); `ResPostBlock` norms what leaves it. A method writes its own block from the two
branches; no module of the backbone is changed for it.
"""

from collections.abc import Callable

from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from lion_fast.backbones import Backbone, cheaper, takes_prefix
from lion_fast.backbones.at_work import works_for_first
from lion_fast.errors import BackboneError
from lion_fast.methods.base import TunedModel


def check_blocks(method: str, backbone: Backbone) -> None:
    """Raise `BackboneError` unless every block of the ViT is one of timm's plain ones."""
    for block in backbone.blocks:
        if not takes_prefix(block):
            inside = type(getattr(block, "attn", None)).__name__
            raise BackboneError(
                f"method {method} knows timm's plain ViT blocks (Block, ResPostBlock with Attention); "
                f"{backbone.name} has {type(block).__name__} with {inside}"
            )


class BlockMethod(TunedModel):
    """A method on plain ViT blocks; it says by `block` what one of them computes."""

    families = ("vit",)

    def __init__(self, backbone, num_classes: int, **options):
        super().__init__(backbone, num_classes, **options)
        check_blocks(self.method, self.backbone)

    def features(self, images: Tensor) -> Tensor:
        x = self.backbone.enter(images)
        for i, block in enumerate(self.backbone.blocks):
            x = self.block(i, block, x)
        return self.backbone.pool(self.backbone.norm(x), self.pool)

    def block(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        """Rows (B, N, D) behind block i."""
        raise TypeError(f"{type(self).__name__} must say what a block computes")


def attention_branch(
    block: nn.Module, x: Tensor, attention: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """What the first half of a block adds to rows (B, N, D); `attention` stands in for the block's own."""
    attention = block.attn if attention is None else attention
    if isinstance(block, ResPostBlock):
        return block.norm1(attention(x))
    return block.ls1(attention(block.norm1(x)))


def after_attention(block: nn.Module, out: Tensor) -> Tensor:
    """What a block does to an attention's output before adding it: LayerScale, or the norm behind."""
    return block.norm1(out) if isinstance(block, ResPostBlock) else block.ls1(out)


def heads(attn: nn.Module, rows: Tensor) -> Tensor:
    """Rows (..., N, h d) to heads (..., h, N, d)."""
    return rows.unflatten(-1, (attn.num_heads, -1)).transpose(-3, -2)


@works_for_first
def attend(attn: nn.Module, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`cheaper.attend`, then the frozen output projection: rows (B, N, D)."""
    return attn.proj(cheaper.attend(attn, x, q, k, v))


@works_for_first
def self_attention(attn: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
    """The frozen self-attention on rows (B, N, D), `extra` (B, N, 3 h d) added to its q, k, v."""
    q, k, v = (heads(attn, part) for part in (attn.qkv(x) + extra).chunk(3, -1))
    return attend(attn, x, attn.q_norm(q), attn.k_norm(k), v)
