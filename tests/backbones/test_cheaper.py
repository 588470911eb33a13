"""The frozen backbone's options: what is kept, folded norms, precision. Judged against the plain backbone."""

import copy
import pickle
from inspect import signature

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer

import lion_fast
from lion_fast import create, load_backbone
from lion_fast.backbones import Backbone, cheaper, fp8, prefix_block
from lion_fast.errors import BackboneError, OptionError
from lion_fast.methods import available
from lion_fast.studies.memory import SavedTensors

SIZE = 32
VIT = "vit_tiny_patch16_224"
# from timm 1.0.16 on
ATTN_NORM = {"scale_attn_norm": True} if "scale_attn_norm" in signature(VisionTransformer).parameters else {}
VITS = {
    "plain": {},
    "layerscale": {"init_values": 0.3},
    "qknorm": {"qk_norm": True} | ATTN_NORM,
    "registers": {"reg_tokens": 2, "qkv_bias": False},
    "respost": {"block_fn": timm.models.vision_transformer.ResPostBlock},
    "swiglu": {"mlp_layer": timm.layers.SwiGLU},
}
SWIN = {"window_size": 7, "depths": (2, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}


def small(**options):
    return load_backbone(VIT, pretrained=False, img_size=SIZE, depth=1, **options)


def vit(kind="plain", dtype=torch.float64, **options):
    """The same random weights for the same kind, norms and scales moved off their starts."""
    torch.manual_seed(3)
    model = timm.create_model(VIT, num_classes=0, img_size=SIZE, depth=2, **VITS[kind])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    backbone = Backbone(model.to(dtype), img_size=SIZE)
    cheaper.apply(backbone, **options)
    return backbone


def swin(name="swin_tiny_patch4_window7_224", dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, img_size=56, **SWIN)
    backbone = Backbone(model.to(dtype), img_size=56)
    cheaper.apply(backbone, **options)
    return backbone


def make(backbone, method, **options):
    """A method by name; "lion:residual" is LION with both ends."""
    method, _, form = method.partition(":")
    options |= {"form": form} if form else {}
    model = create(backbone, method, num_classes=4, seed=5, **options).to(next(backbone.parameters()).dtype)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not name.startswith("backbone."):
                p.add_(0.05 * torch.randn_like(p))  # no method at a start where half of it is zero
    return model.train()


def images(backbone, n=3):
    side = backbone.img_size
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, 3, side, side, generator=generator, dtype=next(backbone.parameters()).dtype)


def outputs_and_gradients(model, call=None):
    x = images(model.backbone).requires_grad_()
    torch.manual_seed(13)  # for methods that draw
    logits = (model if call is None else call)(x)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(17), dtype=logits.dtype)
    logits.backward(upstream)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads | {"images": x.grad}


def assert_same(first, second, rtol):
    logits_a, grads_a = first
    logits_b, grads_b = second
    assert (logits_a - logits_b).norm() <= rtol * logits_b.norm()
    assert grads_a.keys() == grads_b.keys()
    assert len(grads_a) > 1
    for name, expected in grads_b.items():
        assert expected.isfinite().all()
        assert (grads_a[name] - expected).norm() <= rtol * expected.norm() + 1e-12, name


def methods_on(family):
    return [*(name for name, cls in available().items() if family in cls.families), "lion:residual"]


# -- memory="save"


@pytest.mark.parametrize(
    ("build", "kind", "method"),
    [
        *((vit, kind, method) for kind in VITS for method in methods_on("vit")),
        *((swin, "swin_tiny_patch4_window7_224", method) for method in methods_on("swin")),
        (swin, "swinv2_tiny_window8_256", "lion:residual"),
    ],
)
def test_saved_memory_changes_no_output_and_no_gradient(build, kind, method):
    """In float64 to 1e-12, so that it is the same formula and not just close."""
    try:
        plain = make(build(kind), method)
    except BackboneError:  # a method that needs other blocks says so alike
        with pytest.raises(BackboneError):
            make(build(kind, memory="save"), method)
        return
    save = make(build(kind, memory="save"), method)
    assert_same(outputs_and_gradients(save), outputs_and_gradients(plain), 1e-12)


@pytest.mark.parametrize("method", methods_on("vit"))
def test_saved_memory_in_float32(method):
    """The promise: 1e-6, relative, in the dtype that people train in."""
    expected = outputs_and_gradients(make(vit(dtype=torch.float32), method))
    found = outputs_and_gradients(make(vit(dtype=torch.float32, memory="save"), method))
    assert_same(found, expected, 1e-6)


def test_rows_are_recomputed_in_chunks(monkeypatch):
    expected = outputs_and_gradients(make(vit(), "lion:residual"))
    monkeypatch.setattr(cheaper, "CHUNK_ROWS", 4)  # 15 rows: three whole chunks and a shorter one
    assert_same(outputs_and_gradients(make(vit(memory="save"), "lion:residual")), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_memory_under_autocast_is_the_plain_autocast(dtype):
    found = []
    for memory in ("plain", "save"):
        model = make(vit(dtype=torch.float32, memory=memory), "lion:residual")
        x = images(model.backbone).requires_grad_()
        with torch.autocast("cpu", dtype):
            logits = model(x)
        F.cross_entropy(logits.float(), torch.tensor([0, 1, 2])).backward()
        found.append((logits.detach().float(), x.grad, model.input_end.A.grad))
    for plain, save in zip(*found, strict=True):
        # the same products in the same dtype; only sums that autograd forms in another order may round apart
        assert (plain - save).norm() <= torch.finfo(dtype).eps * plain.norm()


@pytest.mark.parametrize("memory, wide, norms", [("plain", 10, 2), ("save", 5, 1)])
def test_what_a_block_keeps_by_hand(memory, wide, norms):
    """Plain: 10 D a token (x, q, k, v, attention's output, second norm's input, 4 D activation); save: 5 D.

    Beside them per token and block the attention's logsumexp (one a head) and the norms' mean and deviation;
    with a prefix, P rows of keys and values for each image, and no second copy of anything.
    """
    B, N, P, D, h, L = 3, 5, 4, 192, 3, 2
    backbone = vit(dtype=torch.float32, memory=memory)
    rows, token = torch.randn(B, N, D, requires_grad=True), wide * D + h + 2 * norms
    with SavedTensors(backbone) as kept:
        out = backbone.model.blocks(rows)
    assert kept.bytes["backbone"] == kept.total == 4 * B * N * L * token
    k, v = torch.randn(2, h, P, D // h)
    with SavedTensors(backbone, [k]) as kept:
        prefixed = prefix_block(backbone.blocks[0], rows * 1, k, v)
    assert kept.total == 4 * B * (N * token + 2 * P * D)
    (out + prefixed).sum().backward()


@pytest.mark.parametrize("method", ["lion:residual", "vpt", "full", "ssf", "lora"])
def test_saved_memory_keeps_less_for_every_method(method):
    sizes = []
    for memory in ("plain", "save"):
        model = make(vit(dtype=torch.float32, memory=memory), method)
        x = images(model.backbone)
        with SavedTensors(model, [x]) as kept:
            logits = model(x)
        sizes.append(kept.total)
        logits.sum().backward()
    assert sizes[1] < 0.85 * sizes[0]


def test_vit_b_keeps_at_most_0_55_of_the_plain_step():
    """The published number: a LION training step on blocks of ViT-B's width and length."""
    sizes = []
    for memory in ("plain", "save"):
        backbone = load_backbone("vit_base_patch16_224", pretrained=False, depth=4, memory=memory)
        model = create(backbone, "lion", num_classes=10, form="residual")
        x = torch.randn(1, 3, 224, 224)
        with SavedTensors(model, [x]) as kept:
            model(x)
        sizes.append(kept.bytes["backbone"])
    assert sizes[1] <= 0.55 * sizes[0]


def test_a_compiled_model_with_saved_memory():
    model = make(vit(dtype=torch.float32, memory="save"), "lion:residual")
    expected = outputs_and_gradients(model)
    model.zero_grad()
    assert_same(outputs_and_gradients(model, torch.compile(model, backend="aot_eager")), expected, 1e-5)


def test_nothing_is_kept_or_built_without_gradients():
    model = make(vit(memory="save"), "lion:residual").eval()
    with torch.no_grad(), SavedTensors(model) as kept:
        out = model(images(model.backbone))
    assert kept.total == 0 and out.grad_fn is None


def test_second_derivatives_are_refused():
    block = vit(memory="save").blocks[0]  # alone: an equilibrium or torch's attention would refuse first
    weight = block.mlp.fc1.weight
    x, rows = (torch.randn(2, 5, weight.shape[1], dtype=weight.dtype).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(cheaper.tail(block, x, rows).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_copies_and_pickles_still_save():
    backbone = vit(memory="save")
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert other.memory == "save" and type(other.blocks[0]) is cheaper.SavingBlock
        x = images(backbone)
        assert torch.equal(other(x), backbone(x))


def test_saved_memory_refuses_what_it_does_not_know():
    with pytest.raises(BackboneError, match='memory="save" knows'):
        load_backbone("resnet10t", pretrained=False, memory="save")
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    with pytest.raises(BackboneError, match="ParallelScalingBlock"):
        small(block_fn=parallel, memory="save")
    with pytest.raises(OptionError, match="memory must be one of plain, save"):
        small(memory="small")


# -- frozen means no gradients


@pytest.mark.parametrize("options", [{}, {"memory": "save"}, {"fold": True}, {"precision": "bf16"}])
@pytest.mark.parametrize("method", ["lion", "lion:residual", "vpt", "probe"])
def test_no_gradient_buffer_for_frozen_weights(method, options):
    """Neither in .grad nor on the way: no tensor of a frozen weight's shape is made by the backward."""
    model = make(vit(dtype=torch.float32, **options), method)
    shapes = {p.shape for p in model.backbone.blocks.parameters() if p.ndim == 2}
    logits = model(images(model.backbone).float())

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        made = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            own = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t)]
            given = {t.untyped_storage().data_ptr() for t in args if torch.is_tensor(t)}
            self.made |= {t.shape for t in own if t.untyped_storage().data_ptr() not in given}
            return out

    with Watch() as watch:
        logits.sum().backward()
    assert watch.made and not (watch.made & shapes)
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())


# -- folding


@pytest.mark.parametrize("method", cheaper.FOLDABLE)
@pytest.mark.parametrize("kind", ["plain", "layerscale", "qknorm", "registers"])
def test_folding_changes_no_output_and_no_gradient(method, kind):
    expected = outputs_and_gradients(make(vit(kind), method))
    folded = make(vit(kind, fold=True), method)
    assert not any("norm1" in n or "norm2" in n for n, _ in folded.backbone.blocks.named_parameters())
    assert_same(outputs_and_gradients(folded), expected, 1e-11)


def test_folding_in_float32():
    expected = outputs_and_gradients(make(vit("layerscale", torch.float32), "lion:residual"))
    found = outputs_and_gradients(make(vit("layerscale", torch.float32, fold=True), "lion:residual"))
    assert (found[0] - expected[0]).norm() <= 1e-6 * expected[0].norm()
    assert_same(found, expected, 5e-6)


@pytest.mark.parametrize(
    ("method", "options", "word"),
    [
        *((m, {"fold": True}, "reads or trains") for m in available() if m not in cheaper.FOLDABLE),
        *((m, {"precision": "bf16"}, "bfloat16") for m in cheaper.OWNERS),
    ],
)
def test_what_a_method_reads_or_trains_is_not_folded_and_not_held_in_half(method, options, word):
    with pytest.raises(OptionError, match=word):
        make(vit(dtype=torch.float32, **options), method)


def test_folding_refuses_other_backbones():
    for backbone in (swin(), vit("respost"), vit("swiglu")):
        with pytest.raises(BackboneError, match="fold=True knows"):
            cheaper.apply(backbone, fold=True)
    with pytest.raises(OptionError, match="fold"):
        small(fold="yes")


def test_the_hash_is_that_of_the_weights_as_loaded(tmp_path):
    plain = vit(dtype=torch.float32)
    for options in ({"fold": True}, {"precision": "bf16"}, {"memory": "save"}):
        assert vit(dtype=torch.float32, **options).weights_sha256 == plain.weights_sha256
    make(vit(dtype=torch.float32, fold=True, memory="save"), "lion:residual").save_adapter(tmp_path)
    other = lion_fast.load_adapter(tmp_path, backbone=plain)
    assert other.backbone.memory == "plain"


# -- precision


@pytest.mark.parametrize("method", [m for m in methods_on("vit") if m not in cheaper.OWNERS])
def test_frozen_weights_in_bf16_with_fp32_adapters(method):
    exact = make(vit(dtype=torch.float32), method).eval()
    half = make(vit(dtype=torch.float32), method).eval()
    cheaper.apply(half.backbone, precision="bf16")
    x = images(exact.backbone)
    logits = half(x)
    assert logits.dtype == torch.float32
    if method != "dyt":  # a token at the threshold may fall to the other side
        # one rounding of 2^-9 per operation, some thirty in a row, adding up as random ones do
        assert (logits - exact(x)).norm() <= 30**0.5 * 2**-8 * exact(x).norm()
    half.train()(x).sum().backward()
    backbone = {id(p) for p in half.backbone.parameters()}
    for name, p in half.named_parameters():
        if id(p) in backbone:
            assert p.dtype == torch.bfloat16 and p.grad is None, name
        else:
            assert p.dtype == torch.float32 and p.grad.dtype == torch.float32, name


def test_held_norms_keep_half_rows_under_autocast():
    """Autocast alone keeps a float32 copy of every norm's input."""
    sizes = {}
    for precision in ("fp32", "bf16"):
        model = make(vit(dtype=torch.float32, precision=precision), "lion:residual")
        with SavedTensors(model) as kept, torch.autocast("cpu", torch.bfloat16):
            model(images(model.backbone))
        sizes[precision] = [
            shape
            for owner, shape, dtype in kept.tensors
            if (owner, dtype, shape[-1:], len(shape)) == ("backbone", torch.float32, (192,), 3)
        ]
    assert sizes["fp32"] and not sizes["bf16"]


def test_a_held_and_folded_backbone_can_be_cast_back():
    backbone = vit(dtype=torch.float32, fold=True, precision="bf16").float()
    assert backbone.body(torch.randn(1, 5, 192)).dtype == torch.float32


def test_fp8_is_refused_with_the_reason(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BackboneError, match='precision="fp8" cannot run: there is no CUDA device'):
            small(precision="fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A100")
    assert fp8.why_not() == "A100 has compute capability 8.0; fp8 needs 9.0 (Hopper) or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert fp8.why_not() is None
    with pytest.raises(BackboneError, match="no ViT blocks"):
        fp8.check_available(lion_fast.load_backbone("resnet10t", pretrained=False))
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "no scaled fp8 matrix product" in fp8.why_not()


def test_an_fp8_linear_off_its_gpu_says_so():
    linear = fp8.Fp8Linear(torch.nn.Linear(16, 32))
    with pytest.raises(BackboneError, match="precision fp8 cannot run"):
        linear(torch.randn(2, 16))


@pytest.mark.parametrize("bias", [True, False])
def test_the_emulated_product_is_the_rounded_one(bias):
    """Against the formula in float64: both factors rounded to e4m3 by their rows' scales, multiplied."""
    linear = torch.nn.Linear(48, 32, bias=bias)
    made = fp8.Fp8Linear(linear, emulate=True)
    x = torch.randn(2, 5, 48, requires_grad=True)

    def rounded(t):
        scale = t.abs().amax(-1, keepdim=True) / 448
        return (t / scale).to(torch.float8_e4m3fn).double() * scale.double()

    expected = rounded(x.detach()) @ rounded(linear.weight.detach()).T
    expected = expected + linear.bias.double() if bias else expected
    out = made(x)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 32)
    assert (out.double() - expected).norm() <= 2**-8 * expected.norm()
    # e4m3 has 3 bits: a rounding of at most 2^-4 per factor, 0.036 in the mean square over both
    exact = F.linear(x, linear.weight, linear.bias)
    assert 1e-3 * exact.norm() < (out - exact).norm() < 0.06 * exact.norm()
    upstream = torch.randn(out.shape)
    out.backward(upstream.to(out.dtype))
    slope = upstream.double() @ linear.weight.double()
    assert (x.grad - slope).norm() <= 0.06 * slope.norm()
    assert (made.weight.double() - linear.weight).abs().max() <= 2**-4 * linear.weight.abs().max()


def test_the_output_error_of_an_fp8_backbone_is_reported():
    exact, rough = vit(dtype=torch.float32), vit(dtype=torch.float32)
    cheaper.hold(rough, torch.bfloat16)
    rough.precision = "fp8"
    fp8.convert(rough, emulate=True)
    assert len(fp8.linears(exact)) == 8  # qkv, proj, fc1, fc2 in two blocks
    x = images(exact, 8)
    told = fp8.error(rough(x), exact(x))
    assert 1e-3 < told.relative < 0.1 and told.sqnr_db > 20 and told.cosine > 0.99
    model = make(rough, "vpt")
    model(x).sum().backward()
    assert model.prompts.grad.isfinite().all() and model.prompts.grad.any()


def test_a_cast_does_not_touch_the_8_bits():
    linear = fp8.Fp8Linear(torch.nn.Linear(16, 32), emulate=True)
    x = torch.randn(3, 16)
    expected = linear(x)
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(linear.to(dtype)(x), expected)


@pytest.mark.gpu
def test_fp8_on_the_gpu_is_the_emulated_product():
    linear = torch.nn.Linear(256, 512)
    x = torch.randn(64, 256)
    expected = fp8.Fp8Linear(linear, emulate=True)(x)
    found = fp8.Fp8Linear(linear).cuda()(x.cuda()).cpu()
    assert (found.float() - expected.float()).norm() <= 2**-7 * expected.float().norm()
