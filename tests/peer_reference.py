"""The peers written down once more, from their formulas and the weights of a plain timm ViT alone.

Independent of the package: attention by explicit softmax, block by block, for a pre-norm ViT with one class
token and without LayerScale or query and key norms. Used in float64.
"""

import math

import torch
import torch.nn.functional as F


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm(x, layer):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias


def split(rows, heads):
    return rows.reshape(*rows.shape[:-1], heads, -1).transpose(-2, -3)


def softmax_attention(q, k, v, heads):
    """q (B, N, D), k and v (B, M, D) to (B, N, D); k and v may be heads (B, h, M, d) already."""
    q = split(q, heads)
    k, v = (t if t.ndim == 4 else split(t, heads) for t in (k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(len(q), -1, q.shape[1] * q.shape[-1])


def qkv(attn, rows):
    return linear(rows, attn.qkv).chunk(3, -1)


def self_attention(attn, rows, added=0):
    q, k, v = (linear(rows, attn.qkv) + added).chunk(3, -1)
    return linear(softmax_attention(q, k, v, attn.num_heads), attn.proj)


def mlp(module, rows):
    return linear(F.gelu(linear(rows, module.fc1)), module.fc2)


def tokens(vit, images):
    return vit._pos_embed(vit.patch_embed(images))


def logits(model, x):
    return linear(norm(x, model.backbone.model.norm)[:, 0], model.head)


def bottleneck(x, adapter, activation):
    return linear(activation(linear(x, adapter.down)), adapter.up)


def adaptformer(model, images):
    vit = model.backbone.model
    x = tokens(vit, images)
    for block, adapter in zip(vit.blocks, model.adapters, strict=True):
        x = x + self_attention(block.attn, norm(x, block.norm1))
        x = x + mlp(block.mlp, norm(x, block.norm2)) + 0.1 * bottleneck(x, adapter, torch.relu)
    return logits(model, x)


def houlsby(model, images):
    vit = model.backbone.model
    x = tokens(vit, images)
    for block, one, two in zip(vit.blocks, model.after_attention, model.after_mlp, strict=True):
        a = self_attention(block.attn, norm(x, block.norm1))
        x = x + (a + bottleneck(a, one, F.gelu))
        m = mlp(block.mlp, norm(x, block.norm2))
        x = x + (m + bottleneck(m, two, F.gelu))
    return logits(model, x)


def lora(model, images):
    vit, scale = model.backbone.model, model.options["alpha"] / model.options["rank"]
    x = tokens(vit, images)
    for i, block in enumerate(vit.blocks):
        rows = norm(x, block.norm1)
        if model.options["target"] == "qkv":
            added = scale * (rows @ model.A[i, 0].T @ model.B[i, 0].T)
        else:
            q, v = (scale * (rows @ model.A[i, j].T @ model.B[i, j].T) for j in (0, 1))
            added = torch.cat([q, torch.zeros_like(q), v], -1)
        x = x + self_attention(block.attn, rows, added)
        x = x + mlp(block.mlp, norm(x, block.norm2))
    return logits(model, x)


def apt(model, images):
    vit = model.backbone.model
    x = tokens(vit, images)
    for i, block in enumerate(vit.blocks):
        t = norm(x, block.norm1)
        y = self_attention(block.attn, t)
        P = model.P[i]
        a = torch.relu(t @ (P + P @ model.A[i] @ model.B[i]).T)
        w = a.max(-1, keepdim=True).values.detach()
        x = x + (y + w * (a @ P)) * model.s[i].exp()
        x = x + mlp(block.mlp, norm(x, block.norm2))
    return logits(model, x)


def cvpt(model, images):
    vit = model.backbone.model
    x = tokens(vit, images)
    for i, block in enumerate(vit.blocks):
        x = x + self_attention(block.attn, norm(x, block.norm1))
        P = model.prompts[i].expand(len(x), -1, -1)
        q, k, v = qkv(block.attn, x)[0], *qkv(block.attn, P)[1:]
        x = x + linear(softmax_attention(q, k, v, block.attn.num_heads), block.attn.proj)
        x = x + mlp(block.mlp, norm(x, block.norm2))
    return logits(model, x)


def dyt(model, images):
    """In evaluation, every token through the MLP, then masked."""
    vit = model.backbone.model
    x = tokens(vit, images)
    for block, adapter, gate in zip(vit.blocks, model.adapters, model.dispatchers, strict=True):
        x = x + self_attention(block.attn, norm(x, block.norm1))
        M = (torch.sigmoid(linear(x, gate)) > model.options["threshold"]).to(x.dtype)
        M[:, 0] = 1
        x = x + M * mlp(block.mlp, norm(x, block.norm2)) + bottleneck(x, adapter, torch.relu)
    return logits(model, x)


def ssf(model, images):
    vit, tuned = model.backbone.model, model.changes

    def change(y, name):
        return y * tuned[name].scale + tuned[name].shift

    # the patch embedding as a product with the flattened kernel
    conv = vit.patch_embed.proj
    patches = F.unfold(images, conv.kernel_size, stride=conv.stride).transpose(1, 2)
    x = change(patches @ conv.weight.flatten(1).T + conv.bias, "patch_embed-proj")
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for i, block in enumerate(vit.blocks):
        at, attn = f"blocks-{i}-", block.attn
        rows = change(norm(x, block.norm1), at + "norm1")
        q, k, v = change(linear(rows, attn.qkv), at + "attn-qkv").chunk(3, -1)
        out = linear(softmax_attention(q, k, v, attn.num_heads), attn.proj)
        x = x + change(out, at + "attn-proj")
        rows = change(norm(x, block.norm2), at + "norm2")
        rows = F.gelu(change(linear(rows, block.mlp.fc1), at + "mlp-fc1"))
        x = x + change(linear(rows, block.mlp.fc2), at + "mlp-fc2")
    return linear(change(norm(x, vit.norm), "norm")[:, 0], model.head)


def carried(model, images, prompts, kv=None):
    """Prompts (L, P, D), or (1, P, D) once, in front of the blocks; kv (L, h, M, d) beside their keys."""
    vit = model.backbone.model
    x = tokens(vit, images)
    for i, block in enumerate(vit.blocks):
        count = prompts.shape[1]
        if i < len(prompts):
            x = torch.cat([x[:, :1], prompts[i].expand(len(x), -1, -1), x[:, 1 + (count if i else 0) :]], 1)
        attn = block.attn
        q, k, v = qkv(attn, norm(x, block.norm1))
        k, v = (split(t, attn.num_heads) for t in (k, v))
        if kv is not None:
            k, v = (torch.cat([kv[i].expand(len(x), -1, -1, -1), t], 2) for t in (k, v))
        x = x + linear(softmax_attention(q, k, v, attn.num_heads), attn.proj)
        x = x + mlp(block.mlp, norm(x, block.norm2))
    return logits(model, x)


def vpt(model, images):
    return carried(model, images, model.prompts)


def vfpt(model, images):
    prompts, m = [], math.floor(model.options["fraction"] * model.options["length"] + 1e-9)
    for rows in model.prompts:
        # the two sums of the transform as they are defined
        D = rows.shape[1]
        wave_m, wave_d = (
            torch.exp(-2j * math.pi * torch.outer(j, j) / max(n, 1))
            for n, j in ((n, torch.arange(n, dtype=torch.float64)) for n in (m, D))
        )
        seen = wave_m @ rows[:m].to(torch.complex128) @ wave_d
        prompts.append(torch.cat([seen.real, rows[m:]]))
    return carried(model, images, torch.stack(prompts))


def e2vpt(model, images):
    """With masks given as the model holds them; pruned tokens zero ("masked") or gone ("removed")."""
    P, D = model.length, model.backbone.width_in
    rows = torch.zeros(len(model.backbone.blocks), P, D, dtype=model.prompts.dtype)
    for a, token in enumerate(model.kept_tokens.tolist()):
        kept = set(model.kept_segments[a].tolist())
        dims = [j for j in range(D) if j % 16 in kept]
        rows[:, token, dims] = model.prompts[:, a]
    if model.token_mask is not None:  # dimension j is in segment j mod 16
        rows = model.token_mask[:, None] * model.segment_mask[:, torch.arange(D) % 16] * rows
    if model.removal == "removed":
        rows = rows[:, model.kept_tokens]
    kv = None if model.kv_prompts is None else model.kv_prompts[:, 0]
    return carried(model, images, rows, kv)
