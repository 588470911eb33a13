"""Two forms of one function agree; merged models are bare backbones; what each method promises of its own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from method_helpers import VIT, VITS, backbone, gradients, images, shaken

from lion_fast.adapters import load_adapter, save_adapter
from lion_fast.backbones import load_backbone
from lion_fast.errors import AdapterError, BackboneError, OptionError
from lion_fast.methods import CVPT, E2VPT, VFPT, VPT, DyT, create
from lion_fast.methods.partial import block_names
from lion_fast.methods.vfpt import fourier_fft, fourier_map

ALL = [*VITS, "swin", "swinv2", "resnet", "convnext", "mobilenetv3"]
PADDED = {"img_size": 72, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2)}


def assert_same(a, b, x, g):
    """Outputs and every gradient of two models with the same adapter, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        (out_a, grads_a), (out_b, grads_b) = (
            gradients(model.to(dtype), x.to(dtype), g.to(dtype)) for model in (a, b)
        )
        torch.testing.assert_close(out_b, out_a, rtol=tolerance, atol=tolerance)
        assert grads_a.keys() == grads_b.keys()
        for name, value in grads_a.items():
            torch.testing.assert_close(grads_b[name], value, rtol=tolerance, atol=tolerance)


def two_forms(frozen, method, **options):
    naive, exact = (create(frozen, method, num_classes=4, form=f, **options) for f in ("naive", "exact"))
    shaken(naive)
    exact.load_adapter_state_dict(naive.adapter_state_dict())
    return naive, exact


@pytest.mark.parametrize("key", VITS)
@pytest.mark.parametrize(
    "method, options",
    [
        ("vfpt", {"length": 5, "fraction": 0.6}),
        ("vfpt", {"length": 5, "fraction": 1.0, "pool": "mean"}),
        ("e2vpt", {"length": 5, "kv_length": 3, "masks": "learned"}),
        ("e2vpt", {"length": 5, "kv_length": 3, "share_kv": False, "pool": "mean"}),
        ("e2vpt", {"length": 5, "pruned": (2, 6)}),
        ("e2vpt", {"length": 5, "pruned": (2, 6), "removal": "removed"}),
        ("cvpt", {"length": 5}),
        ("vpt", {"length": 5}),
        ("vpt", {"length": 5, "pool": "mean"}),
    ],
)
def test_exact_is_naive(key, method, options):
    naive, exact = two_forms(backbone(key), method, **options)
    assert_same(naive, exact, images(naive), torch.randn(3, 4))
    with torch.no_grad():  # with what is kept between evaluations
        naive.eval(), exact.eval()
        x = images(naive, dtype=torch.float64)
        torch.testing.assert_close(exact(x), naive(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(exact(x), naive(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["vfpt", "e2vpt", "cvpt", "vpt"])
def test_what_is_kept_is_never_stale(method):
    naive, exact = two_forms(backbone("vit"), method)
    naive.eval(), exact.eval()
    x = images(naive)

    def check():
        naive.load_adapter_state_dict(exact.adapter_state_dict())
        with torch.no_grad():
            torch.testing.assert_close(exact(x), naive(x), rtol=1e-5, atol=1e-5)

    calls, inner = [], exact._prefix
    exact._prefix = lambda: (calls.append(1), inner())[1]
    own = [p for n, p in exact.named_parameters() if p.requires_grad and not n.startswith("head")]
    check(), check()
    with torch.inference_mode():
        exact(x)
    assert len(calls) == 1
    for parameter in own:  # written in place
        with torch.no_grad():
            parameter.mul_(-2)
        check()
        assert len(calls) == 2
        calls.pop()
    exact.load_state_dict(exact.state_dict() | {"prompts": torch.randn_like(exact.prompts)})
    check()
    assert len(calls) == 2
    exact.prompts = torch.nn.Parameter(torch.randn_like(exact.prompts))
    check()
    assert len(calls) == 3
    exact.prompts.data.normal_()  # an update without a trace, as some averaging code does, then eval()
    exact.eval()
    check()
    assert len(calls) == 4
    assert exact(x).requires_grad  # gradients wanted in evaluation: computed anew, in the graph
    assert len(calls) == 5
    naive.double(), exact.double()
    with torch.no_grad():
        torch.testing.assert_close(exact(x.double()), naive(x.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["vfpt", "e2vpt", "cvpt", "vpt"])
def test_prompt_dropout(method):
    frozen = backbone("vit")
    x = images(frozen, 1).expand(4, -1, -1, -1)
    for model, shared in zip(two_forms(frozen, method, dropout=0.5), (False, True), strict=True):
        model.train()
        out = model(x)  # one image four times: only the mask can differ
        assert torch.allclose(out[0], out[1], atol=1e-6) is shared
        assert not torch.allclose(model(x), out, atol=1e-6)
        model.eval()
        assert torch.equal(model(x), model(x))


# vpt: swin and cnn


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [64, 72])
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


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [64, 72])
def test_vpt_swin_blocks_without_prompts_are_timms(name, size):
    """The window attention of both forms, with no prompt in it, against timm's own block."""
    from lion_fast.methods import vpt_swin

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
    frozen = load_backbone("swin_tiny_patch4_window7_224", pretrained=False, **PADDED | {"img_size": 64})
    model = shaken(VPT(frozen, 4, depth="shallow", length=3)).double()
    assert model.form == "naive" and model.num_trainable() == 3 * 16
    x = frozen.enter(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    block = frozen.model.layers[0].blocks[0]
    attn, prompts = block.attn, model.prompts[0][0]
    from lion_fast.methods import vpt_swin

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
    assert model.border.rows.shape == (3, 10, 74) and model.border.columns.shape == (3, 64, 10)
    x = images(model)
    framed = torch.empty(3, 3, 74, 74)
    framed[:, :, :5], framed[:, :, -5:] = model.border.rows[:, :5], model.border.rows[:, 5:]
    framed[:, :, 5:-5, :5], framed[:, :, 5:-5, -5:] = (
        model.border.columns[..., :5],
        model.border.columns[..., 5:],
    )
    framed[:, :, 5:-5, 5:-5] = x
    torch.testing.assert_close(model(x), model.head(frozen(framed)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (frozen.mean, frozen.std))
    pixels = torch.cat([(p * std + mean).flatten() for p in (model.border.rows, model.border.columns)])
    assert 0 <= pixels.min() < 0.01 and 0.99 < pixels.max() <= 1 and abs(pixels.mean() - 0.5) < 0.02
    for option in ({"depth": "deep"}, {"form": "exact"}, {"dropout": 0.1}):
        with pytest.raises(OptionError, match="border of pixels"):
            VPT(frozen, 4, **option)


# vfpt


def test_vfpt_without_a_fraction_is_vpt():
    frozen = backbone("vit")
    vpt = shaken(VPT(frozen, 4, length=5)).double()
    vfpt = VFPT(frozen, 4, length=5, fraction=0.0).double()
    vfpt.load_adapter_state_dict(vpt.adapter_state_dict())
    x = images(vpt, dtype=torch.float64)
    assert torch.equal(vfpt(x), vpt(x))


@pytest.mark.parametrize("m, D", [(1, 768), (7, 48), (8, 768), (200, 192)])
def test_fourier_map(m, D):
    x = torch.randn(2, m, D, dtype=torch.float64)
    expected = torch.fft.fft2(x).real
    torch.testing.assert_close(fourier_fft(x), expected)
    torch.testing.assert_close(fourier_map(x), expected, rtol=0, atol=1e-12 * m * D)
    single = fourier_map(x.float())
    assert (single - expected).abs().max() < 2e-6 * math.sqrt(m * D) * expected.std()
    gain = fourier_map(torch.randn(64, m, D)).std()
    if m == 8:
        assert gain == pytest.approx(math.sqrt(m * D / 2), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fourier_map(x.float()), single)


@pytest.mark.parametrize("fraction, m", [(0, 0), (0.3, 3), (0.5, 5), (0.7, 7), (0.29, 2), (1, 10)])
def test_vfpt_transformed_count(fraction, m):
    assert VFPT(backbone("vit"), 2, length=10, fraction=fraction).transformed == m


# e2vpt


def test_e2vpt_without_its_parts_is_vpt():
    frozen = backbone("vit")
    vpt = shaken(VPT(frozen, 4, length=5)).double()
    x = images(vpt, dtype=torch.float64)
    for options in ({}, {"masks": "learned"}, {"form": "naive"}):
        model = E2VPT(frozen, 4, length=5, kv_length=0, **options).double()
        model.prompts.data.copy_(vpt.prompts)
        model.head.load_state_dict(vpt.head.state_dict())
        torch.testing.assert_close(model(x), vpt(x), rtol=0, atol=1e-12)


def batches(model, n=3, dtype=torch.float32):
    return [(images(model, 4, dtype), torch.arange(4)) for _ in range(n)]


@pytest.mark.parametrize("masks", ["fixed", "learned"])
@pytest.mark.parametrize("form", ["exact", "naive"])
def test_e2vpt_importance_is_the_masks_gradient(masks, form):
    """Against central differences of the loss, mask entry by mask entry."""
    model = E2VPT(backbone("vit"), 4, length=3, masks=masks, form=form).double().eval()
    model.prompts.data.mul_(20)
    data = batches(model, 2, torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    token, segment = model.importance(data)
    assert token.shape == (3,) and segment.shape == (3, 16)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def losses(change, factor):
        with torch.no_grad():
            kept = model.prompts.clone()
            change(model.prompts, factor)
            out = torch.stack([F.cross_entropy(model(x), y) for x, y in data])
            model.prompts.copy_(kept)
            return out

    h, absolute = 1e-4, model.importance(data, absolute=True)
    for p in range(3):
        slopes = (
            losses(lambda P, f, p=p: P[:, p].mul_(f), 1 + h)
            - losses(lambda P, f, p=p: P[:, p].mul_(f), 1 - h)
        ) / (2 * h)
        assert token[p].item() == pytest.approx(slopes.mean().item(), rel=1e-4, abs=1e-9)
        assert absolute[0][p].item() == pytest.approx(slopes.abs().mean().item(), rel=1e-4, abs=1e-9)
        for s in (0, 7, 15):  # the dimensions j with j mod 16 = s
            slope = (
                losses(lambda P, f, p=p, s=s: P[:, p, s::16].mul_(f), 1 + h)
                - losses(lambda P, f, p=p, s=s: P[:, p, s::16].mul_(f), 1 - h)
            ).mean() / (2 * h)
            assert segment[p, s].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
    with pytest.raises(OptionError, match="at least one batch"):
        model.importance([])


@pytest.mark.parametrize("removal", ["masked", "removed"])
def test_e2vpt_pruning(removal, tmp_path):
    frozen = backbone("vit")
    model = shaken(E2VPT(frozen, 4, length=10, kv_length=2, removal=removal, masks="learned"))
    assert model.num_trainable() == 3 * 48 * 12 + 170
    for mask in (model.token_mask, model.segment_mask):
        mask.data.fill_(1)
    whole = model.prompts.detach().clone()
    token, segment = torch.randn(10), torch.randn(10, 16)
    assert model.prune(0.5, 0.5, (token, segment)) == (5, 8)
    assert model.options["pruned"] == [5, 8] and model.options["masks"] == "fixed"
    assert model.num_trainable() == 3 * 48 * (5 * 8 / 16 + 2)
    gone = set(token.argsort()[:5].tolist())
    assert set(model.kept_tokens.tolist()) == set(range(10)) - gone
    expected = whole.clone()
    for p in range(10):
        for s in segment[p].argsort()[:8].tolist():
            expected[:, p, s::16] = 0
        if p in gone:
            expected[:, p] = 0
    if removal == "removed":
        expected = expected[:, model.kept_tokens]
    assert torch.equal(model.visual_prompts(), expected)
    # what is pruned stays so, through a step, saving, and rewinding
    x, labels = images(model, 4), torch.arange(4)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    zeros = expected == 0
    assert ((model.visual_prompts() == 0) == zeros).all()
    model.eval()
    save_adapter(model, tmp_path)
    again = load_adapter(tmp_path, backbone=frozen)
    assert torch.equal(again(x), model(x)) and torch.equal(again.kept_tokens, model.kept_tokens)
    assert again.num_trainable() == model.num_trainable()
    before, kv, head = model.prompts.clone(), model.kv_prompts.clone(), model.head.weight.clone()
    model.rewind()
    assert ((model.visual_prompts() == 0) == zeros).all()
    assert all(
        not torch.equal(a, b)
        for a, b in ((before, model.prompts), (kv, model.kv_prompts), (head, model.head.weight))
    )
    assert model.prompts.abs().max() <= math.sqrt(6 / (3 * 256 + 48))
    with pytest.raises(OptionError, match="pruned already"):
        model.prune(0.1, 0.1, (token, segment))
    with pytest.raises(OptionError, match="before pruning"):
        model.importance([(x, labels)])


def test_e2vpt_masked_and_removed_are_two_functions():
    """A zero prompt still has the key and value of the norm's shift, and draws attention to it."""
    frozen = backbone("vit")
    masked = shaken(E2VPT(frozen, 4, length=6)).double()
    removed = E2VPT(frozen, 4, length=6, removal="removed").double()
    removed.load_adapter_state_dict(masked.adapter_state_dict())
    x = images(masked, dtype=torch.float64)
    assert torch.equal(masked(x), removed(x))
    for model in (masked, removed):
        torch.manual_seed(3)
        model.prune(0.5, 0.0, (torch.randn(6), torch.randn(6, 16)))
    assert [len(model.prefix()[0][0][0]) for model in (masked, removed)] == [6 + 5, 3 + 5]
    assert (masked(x) - removed(x)).abs().max() > 1e-4
    # the three zero prompts of a block are one key, three times
    k, v = masked.prefix()[0]
    zero = [i for i in range(6) if i not in masked.kept_tokens.tolist()]
    block = frozen.blocks[0]
    D = frozen.width_in
    key = block.norm1.bias @ block.attn.qkv.weight[D : 2 * D].T + block.attn.qkv.bias[D : 2 * D]
    for i in zero:
        torch.testing.assert_close(k[:, i].flatten(), key)
        torch.testing.assert_close(v[:, i], v[:, zero[0]])


@pytest.mark.parametrize(
    "length, ratios, pruned",
    [(10, (0.9, 0.9), (9, 12)), (5, (0.1, 0.1), (0, 1)), (1, (0.9, 0.3), (0, 4)), (10, (0.7, 0), (7, 0))],
)
def test_e2vpt_ratios(length, ratios, pruned):
    model = E2VPT(backbone("vit"), 4, length=length)
    assert model.prune(*ratios, (torch.randn(length), torch.randn(length, 16))) == pruned


def test_e2vpt_refuses():
    model = E2VPT(backbone("vit"), 4, length=5)
    good = torch.zeros(5), torch.zeros(5, 16)
    for ratios in ((1.0, 0), (0, -0.1)):
        with pytest.raises(OptionError, match="ratio"):
            model.prune(*ratios, good)
    with pytest.raises(OptionError, match="scores must be of shapes"):
        model.prune(0.5, 0.5, (torch.zeros(4), good[1]))
    model.prune(0.5, 0.5, good)
    state = model.adapter_state_dict()
    for name, bad in (("kept_tokens", 5), ("kept_segments", -1)):
        broken = state[name].clone()
        broken.view(-1)[-1] = bad
        with pytest.raises(AdapterError, match=f"{name} of the adapter are no increasing indices"):
            model.load_adapter_state_dict(state | {name: broken})
    odd = load_backbone(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1, embed_dim=40, num_heads=2
    )
    with pytest.raises(BackboneError, match="16 segments; the width 40"):
        E2VPT(odd, 4)


# cvpt


def test_cvpt_is_not_the_identity_even_without_prompts():
    """With P = 0 every token gets W_o b_v + b_o in every block."""
    frozen = backbone("vit")
    model = CVPT(frozen, 4, length=3).double()
    model.prompts.data.zero_()
    x = images(model, dtype=torch.float64)
    rows = frozen.enter(x)
    for block in frozen.blocks:
        rows = rows + block.attn(block.norm1(rows))
        rows = rows + block.attn.proj(block.attn.qkv.bias[2 * 48 :])
        rows = rows + block.mlp(block.norm2(rows))
    expected = model.head(frozen.norm(rows)[:, 0])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert (expected - model.head(frozen(x))).abs().max() > 1e-3


def test_cvpt_copies_stay_out_of_the_adapter():
    naive = CVPT(backbone("vit"), 4, form="naive")
    assert set(naive.adapter_state_dict()) == {"prompts", "head.weight", "head.bias"}
    assert sum(p.numel() for p in naive.copies.parameters()) == 3 * (4 * 48 * 48 + 4 * 48)
    assert not any(m.training for m in naive.train().copies.modules())
    assert CVPT(naive.backbone, 4).copies is None


# dyt


@pytest.mark.parametrize("key", VITS)
def test_dyt_gathered_is_masked(key):
    masked, gathered = two_forms(backbone(key), "dyt", rank=4)
    for model in (masked, gathered):
        model.eval().double()
    x = images(masked, dtype=torch.float64)
    counted = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda m, args: counted.append(args[0].shape[:-1].numel()))
        for block in gathered.backbone.blocks
    ]
    out, expected = gathered(x), masked(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ran, full = counted[:3], counted[3]
    assert sum(ran) < 3 * full and gathered.diagnostics() == masked.diagnostics()
    prefix = gathered.backbone.num_prefix_tokens
    share = (sum(ran) / 3 - 3 * prefix) / (full - 3 * prefix)
    assert gathered.diagnostics()["passed"] == pytest.approx(share)
    for handle in handles:
        handle.remove()
    # gradients to what evaluation leaves differentiable, and both ends of the range
    names = [n for n, p in masked.named_parameters() if p.requires_grad and "dispatcher" not in n]
    g = torch.randn_like(out)
    for a, b in zip(
        *(torch.autograd.grad(m(x), [m.get_parameter(n) for n in names], g) for m in (masked, gathered)),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for bias in (-1e3, 1e3):
        for model in (masked, gathered):
            for dispatcher in model.dispatchers:
                dispatcher.bias.data.fill_(bias)
        torch.testing.assert_close(gathered(x), masked(x), rtol=0, atol=1e-12)
        assert gathered.diagnostics() == {"passed": float(bias > 0)}


@pytest.mark.parametrize("form", ["exact", "naive"])
@pytest.mark.parametrize("training", [True, False])
def test_dyt_without_a_threshold_is_adaptformer(form, training):
    frozen = backbone("vit")
    former = shaken(create(frozen, "adaptformer", num_classes=4, rank=4, scale=1.0))
    dyt = create(frozen, "dyt", num_classes=4, rank=4, threshold=-1.0, form=form)
    dyt.load_state_dict(former.state_dict(), strict=False)
    former.double().train(training), dyt.double().train(training)
    x = images(dyt, dtype=torch.float64)
    torch.testing.assert_close(dyt(x), former(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dyt.complete(x), former(x), rtol=0, atol=1e-12)


def test_dyt_losses():
    model = shaken(DyT(backbone("vit"), 4, rank=4, rate=0.3)).double().train()
    x, labels = images(model, 5, torch.float64), torch.tensor([0, 1, 2, 3, 0])
    seen = []
    inner = model.mask
    model.mask = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
    logits = model(x)
    terms = model.loss_terms(x, labels)
    assert len(seen) == 3  # the forward's masks were used, and the complete model has none
    masks = torch.stack(seen)
    assert set(masks.detach().unique().round(decimals=9).tolist()) == {0.0, 1.0}
    assert (masks[:, :, 0] == 1).all()
    complete = model.complete(x)
    p, q = complete.softmax(-1).detach(), logits.softmax(-1)
    expected = {
        "complete": -complete.log_softmax(-1)[torch.arange(5), labels].mean(),
        "distillation": (p * (p.log() - q.log())).sum(-1).mean(),
        "rate": 2 * (masks[:, :, 1:].mean() - 0.3) ** 2,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=0, atol=1e-10)
    # the complete model is the teacher: distillation does not move what it alone would
    head = model.head.weight
    found, by_hand = (
        torch.autograd.grad(t, head, retain_graph=True)[0]
        for t in (terms["distillation"], (p * (p.log() - q.log())).sum(-1).mean())
    )
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)
    assert model._last is None and model.diagnostics()["passed"] == masks[:, :, 1:].mean().item()
    # on images the forward did not see it is run anew
    seen.clear()
    model.loss_terms(images(model, 5, torch.float64), labels)
    assert len(seen) == 3
    model.eval()
    with pytest.raises(OptionError, match="belong to training"):
        model.loss_terms(x, labels)


def test_dyt_straight_through():
    """The gradient of a mask is that of its relaxed sample, at dropped tokens too."""
    model = DyT(backbone("vit"), 4).double().train()
    rows = torch.randn(2, 5, 48, dtype=torch.float64)
    gate = model.dispatchers[0]
    gate.weight.data.normal_()
    torch.manual_seed(7)
    mask = model.mask(gate, rows)
    g = torch.randn_like(mask)
    torch.manual_seed(7)
    logit = (rows[:, 1:] @ gate.weight.T).squeeze(-1)
    u = torch.rand_like(logit)
    soft = torch.sigmoid((logit + u.log() - (1 - u).log()) / 5.0)
    assert torch.equal(mask[:, 1:].detach().round(), (soft > 0.5).to(mask.dtype))
    assert 0 < mask[:, 1:].sum() < 8  # tokens of both kinds
    (found,) = torch.autograd.grad(mask, gate.weight, g)
    (expected,) = torch.autograd.grad(soft, gate.weight, g[:, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_dyt_noise_is_gumbels():
    """P(M = 1) is sigmoid(logit), whatever the temperature: the sign of a logistic variable about it."""
    model = DyT(backbone("vit"), 4).train()
    gate = model.dispatchers[0]
    gate.weight.data.zero_()
    for logit in (-2.0, 0.0, 1.0):
        gate.bias.data.fill_(logit)
        with torch.no_grad():
            share = model.mask(gate, torch.zeros(200, 501, 48))[:, 1:].mean().item()
        assert share == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=0.006)


# merging


def shaken_merge(key, method, **options):
    model = shaken(create(backbone(key), method, num_classes=4, **options)).eval()
    given = model.backbone.state_dict()
    merged = model.merge()
    assert all(torch.equal(v, given[k]) for k, v in model.backbone.state_dict().items())
    return model, merged


MERGES = [(key, m) for key in ALL for m in ("ssf", "bitfit", "lntune", "full", "partial")]
MERGES += [(key, m) for key in VITS for m in ("lora", "lora qv")]


@pytest.mark.parametrize("key, method", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_unmerged(key, method, dtype):
    options = {"target": "qv", "alpha": 3.0} if method == "lora qv" else {}
    model = create(backbone(key), method.split()[0], num_classes=4, **options).to(dtype).eval()
    frozen = copy.deepcopy(model.backbone.model.state_dict())
    shaken(model)
    x = images(model, dtype=dtype)
    expected = model(x)
    merged = model.merge()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        merged(x), expected, rtol=tolerance, atol=tolerance * max(1, expected.abs().max().item())
    )
    assert torch.equal(model(x), expected)  # the model that was merged is as it was
    if method.split()[0] in ("ssf", "lora"):
        assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.model.state_dict().items())
    # the bare backbone's modules, no hook among them, and nothing trained
    kinds = [type(m) for m in merged.backbone.model.modules()]
    assert kinds == [type(m) for m in model.backbone.model.modules()]
    assert not any(m._forward_hooks for m in merged.modules())
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())
    assert merged.backbone.weights_sha256 != model.backbone.weights_sha256
    # its whole state, kept by torch, is the whole model
    twin = model.merge()
    for p in twin.parameters():
        p.data.zero_()
    twin.load_state_dict(merged.state_dict())
    torch.testing.assert_close(twin(x), merged(x), rtol=0, atol=0)


def test_merged_says_what_it_is(tmp_path):
    model, merged = shaken_merge("vit", "ssf")
    model.classes = ["a", "b", "c", "d"]
    merged = model.merge()
    assert merged.method == "ssf (merged)" and merged.classes == model.classes
    assert merged.backbone.weights_source == "random, ssf merged"
    assert merged.num_trainable(head=True) == 0
    for save in (merged.save_adapter, lambda d: save_adapter(merged, d)):
        with pytest.raises(AdapterError, match="has no adapter any more"):
            save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(OptionError, match="does not merge"):
        merged.merge()
    for method in ("vpt", "dyt", "adaptformer", "cvpt", "apt", "lion"):
        with pytest.raises(OptionError, match=f"method {method} does not merge"):
            create(backbone("vit"), method, num_classes=2).merge()


def test_ssf_places():
    model = create(backbone("vit"), "ssf", num_classes=4)
    block = ["norm1", "attn-qkv", "attn-proj", "norm2", "mlp-fc1", "mlp-fc2"]
    assert set(model.changes) == {
        "patch_embed-proj",
        "norm",
        *(f"blocks-{i}-{name}" for i in range(3) for name in block),
    }
    swin = create(backbone("swin"), "ssf", num_classes=4).changes
    assert {"layers-1-downsample-reduction", "layers-1-downsample-norm", "patch_embed-norm"} <= set(swin)
    assert not any("cpb_mlp" in name for name in create(backbone("swinv2"), "ssf", num_classes=4).changes)
    assert {"conv1", "bn1", "layer2-0-downsample-0"} <= set(
        create(backbone("resnet"), "ssf", num_classes=4).changes
    )
    again = create(model.backbone, "ssf", num_classes=4)  # a copy takes no hook along
    assert [len(m._forward_hooks) for m in again.backbone.modules()] == [
        len(m._forward_hooks) for m in model.backbone.modules()
    ]


# the backbone's own parameters


@pytest.mark.parametrize(
    "key, names",
    [
        ("vit", ["blocks.2.", "norm."]),
        ("avg", ["blocks.2.", "fc_norm."]),
        ("norm_pre", ["blocks.2.", "norm."]),
        ("swin", ["layers.3.blocks.0.", "norm."]),
        ("resnet", ["layer4.0."]),
        ("convnext", ["stages.3.blocks.0.", "head.norm."]),
    ],
)
def test_partial_places(key, names):
    model = create(backbone(key), "partial", num_classes=4)
    trained = {
        n.removeprefix("backbone.model.")
        for n, p in model.named_parameters()
        if p.requires_grad and "backbone" in n
    }
    expected = {n for n, _ in model.backbone.model.named_parameters() if n.startswith(tuple(names))}
    assert trained == expected and expected
    bare = create(backbone(key), "partial", num_classes=4, last_norm=False)
    assert bare.num_trainable() == sum(
        p.numel() for n, p in bare.backbone.model.named_parameters() if n.startswith(names[0])
    )
    every = create(backbone(key), "partial", num_classes=4, blocks=len(block_names(model.backbone)))
    assert every.num_trainable() > model.num_trainable()


def test_what_pooling_does_not_run_is_not_trained():
    for key, unused in (
        ("no class token", "attn_pool"),
        ("convnext", "head.norm"),
        ("mobilenetv3", "conv_head"),
    ):
        for pool in ("backbone", "mean"):
            model = create(backbone(key), "full", num_classes=4, pool=pool)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert any(unused in n for n in trained) == (pool == "backbone")
            model(images(model)).sum().backward()
            assert all(p.grad is not None for p in model.trainable_parameters())


def test_bitfit_and_lntune_on_a_cnn():
    """Batch norms and the few biases; their statistics stay."""
    model = create(backbone("resnet"), "bitfit", num_classes=4)
    names = {n for n, p in model.backbone.model.named_parameters() if p.requires_grad}
    assert names and all(n.endswith("bias") for n in names)
    assert {n.rpartition(".")[0] for n in names} == {
        n for n, m in model.backbone.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    }
    norms = create(backbone("resnet"), "lntune", num_classes=4)
    assert norms.num_trainable() == 2 * model.num_trainable()
    before = norms.backbone.model.bn1.running_mean.clone()
    norms.train()(images(norms)).sum().backward()
    assert torch.equal(norms.backbone.model.bn1.running_mean, before)
    tables = create(backbone("swin"), "bitfit", num_classes=4)
    assert not any("table" in n for n, p in tables.named_parameters() if p.requires_grad)
    v2 = create(backbone("swinv2"), "bitfit", num_classes=4)
    assert any(n.endswith("q_bias") for n, p in v2.named_parameters() if p.requires_grad)


def test_the_copy_shares_what_it_does_not_train():
    frozen = load_backbone("vit_tiny_patch16_224", pretrained=False, **VIT)
    model = create(frozen, "partial", num_classes=4)
    for (name, a), b in zip(frozen.named_parameters(), model.backbone.parameters(), strict=True):
        assert (a.data_ptr() == b.data_ptr()) != b.requires_grad, name
    shaken(model)
    assert model.backbone.weights_sha256 == frozen.weights_sha256
    model.double()
    assert all(p.dtype == torch.float32 for p in frozen.parameters())
