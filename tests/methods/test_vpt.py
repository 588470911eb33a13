"""VPT: first values, pooling, what is refused; on a Swin in windows, on a CNN as a border of pixels."""

import math

import pytest
import torch
from method_helpers import VIT, assert_same, backbone, images, needs_timm, shaken, two_forms

from lion_fast.backbones import load_backbone
from lion_fast.errors import OptionError
from lion_fast.methods import VPT, create, vpt_swin

SWINS = [
    ("swin_tiny_patch4_window7_224", 64),
    ("swin_tiny_patch4_window7_224", 72),
    ("swinv2_tiny_window8_256", 64),
    pytest.param("swinv2_tiny_window8_256", 72, marks=needs_timm("1.0.31")),
]
PADDED = {"img_size": 72, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2)}


def test_vpt_prompts_stay_out_of_pooling():
    """Average pooling over patches only: by hand with the prompts' rows cut out."""
    frozen = backbone("avg")
    model = VPT(frozen, 4, depth="shallow", length=5)
    x = images(model)
    rows = torch.cat([model.prompts.expand(3, -1, -1), frozen.enter(x)], 1)
    rows = frozen.blocks(rows)[:, 5:]
    expected = model.head(frozen.model.fc_norm(rows.mean(1)))
    torch.testing.assert_close(model(x), expected)


def test_vpt_init():
    for patch, width in ((16, 48), (14, 48)):
        key = "vit" if patch == 16 else "registers"
        model = VPT(backbone(key), 2, length=200)
        bound = math.sqrt(6 / (3 * patch * patch + width))
        assert 0.99 * bound < model.prompts.abs().max() <= bound
        assert abs(model.prompts.mean()) < 0.05 * bound
        assert model.prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_vpt_cache_follows_autocast():
    model = VPT(backbone("vit"), 2, length=4).eval()
    x = images(model)
    with torch.no_grad():
        first = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
            assert model.prefix()[0][0].dtype == torch.bfloat16
        assert model.prefix()[0][0].dtype == torch.float32
        assert torch.equal(model(x), first)
    assert not torch.equal(half, first)


def test_vpt_refuses():
    vit = backbone("vit")
    for option, match in (
        ({"depth": "middle"}, "depth"),
        *(({name: wrong}, name) for name, wrong in (("form", "fast"), ("length", 2.5), ("dropout", 1.0))),
        ({"depth": "shallow", "form": "exact"}, 'exists for depth="deep" only'),
    ):
        with pytest.raises(OptionError, match=match):
            create(vit, "vpt", num_classes=2, **option)
    parallel = load_backbone("vit_small_patch16_18x2_224", pretrained=False, **VIT)
    with pytest.raises(OptionError, match="ParallelThingsBlock"):
        create(parallel, "vpt", num_classes=2, form="exact")
    model = create(parallel, "vpt", num_classes=2)
    assert model.form == "naive" and model(images(model)).shape == (3, 2)


def test_vpt_saves_nothing_per_image_for_the_prefix():
    """The exact form computes keys and values of P rows, however many images."""
    model = VPT(backbone("vit"), 2, length=7)
    assert [tuple(t.shape) for t in model.prefix()[0]] == [(3, 7, 16), (3, 7, 16)]


@pytest.mark.parametrize("name, size", SWINS)
def test_vpt_swin_exact_is_naive(name, size):
    frozen = load_backbone(name, pretrained=False, **PADDED | {"img_size": size})
    for parameter in frozen.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    naive, exact = two_forms(frozen, "vpt", length=3)
    assert exact.num_trainable() == 3 * (16 + 2 * 32 + 64)
    assert_same(naive, exact, torch.randn(2, 3, size, size), torch.randn(2, 4))
    shifted = [any(b.shift_size) for stage in frozen.model.layers for b in stage.blocks]
    assert any(shifted) and not all(shifted)  # both kinds of windows were there


@pytest.mark.parametrize("name, size", SWINS)
def test_vpt_swin_blocks_without_prompts_are_timms(name, size):
    """The window attention of both forms, with no prompt in it, against timm's own block."""
    frozen = load_backbone(name, pretrained=False, **PADDED | {"img_size": size}).double()
    for parameter in frozen.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    x = frozen.enter(torch.randn(2, 3, size, size, dtype=torch.float64))
    for stage in frozen.model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            none = x.new_zeros(0, x.shape[-1])
            expected = block(x)
            torch.testing.assert_close(
                vpt_swin.prefix_block(block, x, *vpt_swin.prompt_kv(block, none)), expected, rtol=0, atol=1e-9
            )
            out, prompts = vpt_swin.carry_block(block, x, none.expand(2, 0, -1))
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
            assert prompts.shape == (2, 0, x.shape[-1])
            x = expected


def test_vpt_swin_by_hand():
    """One window of one image, unshifted: prompts in front of the rows, in plain attention."""
    frozen = load_backbone(SWINS[0][0], pretrained=False, **PADDED | {"img_size": 64})
    model = shaken(VPT(frozen, 4, depth="shallow", length=3)).double()
    assert model.form == "naive" and model.num_trainable() == 3 * 16
    x = frozen.enter(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    block = frozen.model.layers[0].blocks[0]
    attn, prompts = block.attn, model.prompts[0][0]
    out, after = vpt_swin.carry_block(block, x, prompts.expand(1, -1, -1))
    windows, means = {}, []
    for i in range(4):
        for j in range(4):
            cut = x[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(16, 16)
            rows = block.norm1(torch.cat([prompts, cut]))
            q, k, v = attn.qkv(rows).reshape(19, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            logits = q @ k.mT / math.sqrt(q.shape[-1])
            logits[:, 3:, 3:] += attn._get_rel_pos_bias()[0]
            rows = attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(19, 16))
            means.append(rows[:3])
            windows[i, j] = rows[3:].reshape(4, 4, 16)
    attended = torch.cat([torch.cat([windows[i, j] for j in range(4)], 1) for i in range(4)], 0)[None]
    for rows, added, found in ((x, attended, out), (prompts, torch.stack(means).mean(0), after[0])):
        rows = rows + added
        torch.testing.assert_close(found, rows + block.mlp(block.norm2(rows)), rtol=0, atol=1e-12)
    # behind the first stage the bare backbone goes on
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 4)


@pytest.mark.parametrize("key", ["resnet", "convnext", "mobilenetv3"])
def test_vpt_border(key):
    frozen = backbone(key)
    model = VPT(frozen, 4, length=5)
    assert (model.depth, model.form) == ("shallow", "naive")
    assert model.num_trainable() == 12 * 5 * (64 + 5)
    x = images(model)
    framed = torch.empty(3, 3, 74, 74)
    rows, columns = model.border.rows, model.border.columns
    assert rows.shape == (3, 10, 74) and columns.shape == (3, 64, 10)
    framed[:, :, :5], framed[:, :, -5:] = rows[:, :5], rows[:, 5:]
    framed[:, :, 5:-5, :5], framed[:, :, 5:-5, -5:] = columns[..., :5], columns[..., 5:]
    framed[:, :, 5:-5, 5:-5] = x
    torch.testing.assert_close(model(x), model.head(frozen(framed)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (frozen.mean, frozen.std))
    pixels = torch.cat([(p * std + mean).flatten() for p in (rows, columns)])
    assert 0 <= pixels.min() < 0.01 and 0.99 < pixels.max() <= 1 and abs(pixels.mean() - 0.5) < 0.02
    for option in ({"depth": "deep"}, {"form": "exact"}, {"dropout": 0.1}):
        with pytest.raises(OptionError, match="border of pixels"):
            VPT(frozen, 4, **option)
