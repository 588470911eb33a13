"""Prompts: the exact form is the naive one, what is kept is never stale; what VFPT and CVPT promise."""

import math

import pytest
import torch
from method_helpers import VITS, assert_same, backbone, images, two_forms

from lion_fast.methods import CVPT, VFPT
from lion_fast.methods.vfpt import fourier_fft, fourier_map


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
    x, last = images(naive), None

    def check(anew=True):
        """Whether keys and values are computed anew, and what is computed with them."""
        nonlocal last
        naive.load_adapter_state_dict(exact.adapter_state_dict())
        with torch.no_grad():
            torch.testing.assert_close(exact(x), naive(x), rtol=1e-5, atol=1e-5)
            found = exact.prefix()
        assert (found is not last) == anew
        last = found

    check(), check(anew=False)
    with torch.inference_mode():
        assert exact.prefix() is last
    for name, parameter in exact.named_parameters():
        if parameter.requires_grad and not name.startswith("head"):  # written in place
            with torch.no_grad():
                parameter.mul_(-2)
            check()
    exact.load_state_dict(exact.state_dict() | {"prompts": torch.randn_like(exact.prompts)})
    check()
    exact.prompts = torch.nn.Parameter(torch.randn_like(exact.prompts))
    check()
    exact.prompts.data.normal_()  # an update without a trace, as some averaging code does, then eval()
    exact.eval()
    check()
    # gradients wanted in evaluation: computed anew, in the graph
    assert exact(x).requires_grad and exact.prefix() is not last
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
