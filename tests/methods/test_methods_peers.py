"""Every method against its formula, and what all of them promise: frozen stays frozen, saved comes back."""

import copy
import io
import math

import peer_reference
import pytest
import torch
import torch.nn.functional as F
from method_helpers import VIT, VITS, backbone, gradients, images, shaken

from lion_fast.backbones import load_backbone
from lion_fast.errors import BackboneError, OptionError
from lion_fast.methods import available, create

ANY = ["bitfit", "full", "lion", "lntune", "partial", "probe", "ssf", "vpt"]
VIT_ONLY = ["adaptformer", "apt", "cvpt", "dyt", "e2vpt", "houlsby", "lora", "vfpt"]
OWNERS = ["bitfit", "full", "lntune", "partial"]
# with class-token pooling the last dispatcher moves by the rate alone: 0.3 is never met on 48 tokens
SMALL = {
    "dyt": {"rate": 0.3},
    "adaptformer": {"rank": 8},
    "houlsby": {"rank": 8},
    "lora": {"rank": 4},
    "apt": {"length": 9},
}
# parameters whose first gradient is zero: what stands before an up projection that starts at zero
ZERO_AT_FIRST = {"adaptformer": "down.", "houlsby": "down.", "dyt": "down.", "lora": "A", "apt": "A"}
CNNS = ["resnet", "convnext", "mobilenetv3"]
CASES = [
    (key, method)
    for key in ("vit", "qk-norm", "registers", "no class token", "post-norm", *CNNS, "swin", "swinv2")
    for method in ANY + (VIT_ONLY if key in VITS else [])
]


def build(key, method, frozen=None, **options):
    return create(frozen or backbone(key), method, num_classes=4, **SMALL.get(method, {}) | options)


def loss_of(model, x, labels):
    loss = F.cross_entropy(model(x), labels)
    return loss + sum(model.loss_terms(x, labels).values())


def unseen(name):
    """A shift of all keys adds the same to all logits of a query, and a softmax does not see it."""
    return "k_norm" in name and name.endswith(("bias", "shift"))


def test_every_method_is_there():
    assert set(available()) == {*ANY, *VIT_ONLY}


@pytest.mark.parametrize("key, method", CASES)
def test_a_step_moves_what_is_trained_and_nothing_else(key, method):
    frozen = backbone(key, drop_rate=0.3, drop_path_rate=0.5)
    given = {k: v.clone() for k, v in frozen.state_dict().items()}
    model = build(key, method, frozen).double().train()
    if method not in (*OWNERS, "ssf"):
        given = {k: v.double() for k, v in given.items()}  # they hold the backbone itself
    x, labels = images(model, 4, torch.float64), torch.tensor([0, 1, 2, 3])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    loss_of(model, x, labels).backward()
    zero = ZERO_AT_FIRST.get(method)
    for name, parameter in model.named_parameters():
        if unseen(name):
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-12
        elif parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all()
            first = name == zero or (zero and zero in name)
            assert (parameter.grad.abs().max() > 0) != bool(first), name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, x, labels).backward()  # after one step every gradient lives
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in tuned and not unseen(n))
    optimizer.step()

    adapter = model.adapter_state_dict()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (name in tuned) or unseen(name), name
        assert (name in adapter) == (name in tuned or name.startswith("kept_")), name
    assert any(name.startswith("backbone.") for name in adapter) == (method in OWNERS)
    # the backbone that was given, whoever holds it
    assert all(torch.equal(v, given[k]) for k, v in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(m.training for m in model.backbone.modules())


def test_methods_share_a_backbone_without_meeting():
    frozen = backbone("vit")
    x = images(frozen)
    expected = frozen(x)
    models = {m: shaken(build("vit", m, frozen)).eval() for m in available()}
    outputs = {m: model(x) for m, model in models.items()}
    for method, model in models.items():
        F.cross_entropy(model.train()(x), torch.tensor([0, 1, 2])).backward()
        torch.optim.SGD(model.trainable_parameters(), lr=1.0).step()
        outputs.pop(method)
        for other, out in outputs.items():
            assert torch.equal(models[other](x), out), (method, other)
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize(
    "key, method, options",
    [
        *(("vit", method, {}) for method in ANY + VIT_ONLY),
        *((key, "lion", {"form": form}) for key in ("swin", "resnet") for form in ("states", "residual")),
    ],
)
def test_copies_and_pickles_stand_alone(key, method, options):
    """On a CNN LION's input end is the pixel end with its bounded convolution."""
    model = shaken(build(key, method, **options))
    x = images(model)
    loss_of(model, x, torch.tensor([0, 1, 2]))
    model.eval()
    with torch.no_grad():
        out = model(x)  # with kept keys and values, where a method keeps them
        assert torch.equal(model(x), out)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        assert not torch.equal(model(x), out)
        for twin in twins:
            assert torch.equal(twin(x), out)
            shaken(twin)
            assert not torch.equal(twin(x), out)  # its own parameters are what it computes with


@pytest.mark.parametrize("key, method", [c for c in CASES if c[0] in ("vit", "post-norm", "swin", "swinv2")])
def test_autocast_and_double(key, method):
    model = shaken(build(key, method)).eval()
    x = images(model)
    expected = model(x)
    g = torch.randn_like(expected)
    model.train(method == "dyt")  # whose dispatchers have gradients while training only
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(model, x, g)
        with torch.no_grad():
            assert torch.isfinite(model(x)).all()
    assert out.dtype == torch.float32
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in grads.values())
    if method != "dyt":  # a token near the threshold goes the other way
        torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    model.double()
    out, grads = gradients(model, x.double(), g.double())
    assert out.dtype == torch.float64 and all(v.dtype == torch.float64 for v in grads.values())
    torch.testing.assert_close(model.eval()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", VIT_ONLY)
def test_wrong_families_are_refused(method):
    for key in ("swin", "resnet"):
        with pytest.raises(BackboneError, match=f"{method} works on vit .*: {', '.join(ANY)}"):
            build(key, method)


@pytest.mark.parametrize("method", [*VIT_ONLY, "ssf"])
def test_unknown_blocks_are_refused(method):
    parallel = load_backbone("vit_small_patch16_18x2_224", pretrained=False, **VIT)
    with pytest.raises(BackboneError, match=f"{method} knows timm's plain ViT blocks .*ParallelThingsBlock"):
        create(parallel, method, num_classes=2)


@pytest.mark.parametrize(
    "method, option, match",
    [
        ("adaptformer", {"rank": 0}, "rank"),
        ("adaptformer", {"scale": math.nan}, "scale"),
        ("adaptformer", {"dropout": 1.0}, "dropout"),
        ("houlsby", {"rank": 2.0}, "rank"),
        ("lora", {"target": "k"}, "target"),
        ("lora", {"alpha": 0}, "alpha"),
        ("apt", {"length": True}, "length"),
        ("apt", {"length": 2.0}, "length"),
        ("cvpt", {"form": "fast"}, "form"),
        ("cvpt", {"length": -1}, "length"),
        ("vfpt", {"fraction": 1.5}, "fraction"),
        ("e2vpt", {"kv_length": -1}, "kv_length"),
        ("e2vpt", {"masks": "soft"}, "masks"),
        ("e2vpt", {"removal": "gone"}, "removal"),
        ("e2vpt", {"pruned": (10, 0)}, "pruned"),
        ("e2vpt", {"pruned": (0, 13)}, "segments at most 12"),
        ("e2vpt", {"pruned": 3}, "pruned"),
        ("e2vpt", {"pruned": (1, 0), "masks": "learned"}, "comes before pruning"),
        ("dyt", {"rate": 0}, "rate"),
        ("dyt", {"threshold": 1.0}, "threshold"),
        ("dyt", {"threshold": -math.inf}, "threshold"),
        ("dyt", {"temperature": 0.0}, "temperature"),
        ("partial", {"blocks": 0}, "blocks"),
        ("partial", {"blocks": 4}, "blocks"),
    ],
)
def test_options_out_of_range(method, option, match):
    with pytest.raises(OptionError, match=match):
        create(backbone("vit"), method, num_classes=2, **option)


# on every kind of frozen backbone, and compiled


@pytest.mark.parametrize("key", ["vit", "post-norm", "swin"])
def test_saving_memory_changes_no_gradient(key):
    for method in ANY + (VIT_ONLY if key != "swin" else []):
        torch.manual_seed(0)
        plain = backbone(key)
        torch.manual_seed(0)
        saving = backbone(key, memory="save")
        found = []
        for frozen in (plain, saving):
            torch.manual_seed(1)
            model = shaken(build(key, method, frozen)).train()
            x = images(model)
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            loss = loss_of(model, x, torch.tensor([0, 1, 2]))
            found.append(torch.autograd.grad(loss, [model.get_parameter(n) for n in names]))
        for name, a, b in zip(names, *found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=f"{method}: {name}")


@pytest.mark.parametrize("method", ["vpt", "ssf", *VIT_ONLY])
def test_weights_held_in_fewer_bits(method):
    """Own parameters stay float32 and get gradients; merging rounds once, and is refused in 8 bits."""
    from lion_fast.backbones import fp8

    for precision in ("bf16", "fp8"):
        wide = {"embed_dim": 48, "num_heads": 3}
        frozen = load_backbone(
            "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, precision="bf16", **wide
        )
        if precision == "fp8":
            fp8.convert(frozen, emulate=True)
            frozen.precision = "fp8"
        for form in ("exact", "naive") if method in ("vpt", "e2vpt", "vfpt", "cvpt", "dyt") else (None,):
            model = build("vit", method, frozen, **({"form": form} if form else {})).train()
            loss_of(model, images(model), torch.tensor([0, 1, 2])).backward()
            for p in model.trainable_parameters():
                assert p.dtype == torch.float32 and torch.isfinite(p.grad).all()
            model.eval()
            assert model(images(model)).isfinite().all()
        assert "blocks-0-attn-qkv" in getattr(model, "changes", {"blocks-0-attn-qkv"})
        if method in ("ssf", "lora") and precision == "fp8":
            with pytest.raises(OptionError, match=f"{method} does not merge into weights held in 8 bits"):
                model.merge()
        elif method in ("ssf", "lora"):  # as exact as the weights: one rounding to bfloat16
            shaken(model, 0.02)
            merged, x = model.merge(), images(model)
            assert merged.backbone.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
            wide = copy.deepcopy(model).float()
            wide.backbone.precision = "fp32"
            kept = wide.merge().backbone.model.state_dict()
            for name, value in merged.backbone.model.state_dict().items():
                assert torch.equal(value, kept[name].to(torch.bfloat16)), name
            torch.testing.assert_close(merged(x), model(x), rtol=0.1, atol=0.05)


QUICK = ["ssf", "vpt", "dyt"]  # a hook, a cache, a shape that depends on data


@pytest.mark.parametrize(
    "method",
    [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in [*ANY, *VIT_ONLY] if m not in QUICK)],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # how many tokens pass
def test_compiled_in_one_graph(method):
    for training in (True, False):
        torch._dynamo.reset()
        model = shaken(build("vit", method)).train(training)
        x = images(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        outs = []
        with torch.set_grad_enabled(training):
            for call in (model, compiled):
                torch.manual_seed(5)
                outs.append(call(x))
        torch.testing.assert_close(outs[1], outs[0])
        if training:
            outs[1].sum().backward()


# against the formulas


@pytest.mark.parametrize(
    "method, options",
    [
        ("adaptformer", {"rank": 5}),
        ("houlsby", {"rank": 5}),
        ("lora", {"rank": 3, "alpha": 7.0}),
        ("lora", {"rank": 3, "alpha": 2.0, "target": "qv"}),
        ("apt", {"length": 9}),
        ("ssf", {}),
        ("cvpt", {"length": 6}),
        ("cvpt", {"length": 6, "form": "naive"}),
        ("dyt", {"rank": 5}),
        ("dyt", {"rank": 5, "form": "naive", "threshold": 0.45}),
        ("vpt", {"length": 5}),
        ("vpt", {"length": 5, "form": "naive"}),
        ("vpt", {"length": 5, "depth": "shallow"}),
        ("vfpt", {"length": 5, "fraction": 0.0}),
        ("vfpt", {"length": 10, "fraction": 0.7}),
        ("vfpt", {"length": 10, "fraction": 0.3, "form": "naive"}),
        ("vfpt", {"length": 1, "fraction": 1.0}),
        ("e2vpt", {"length": 6, "kv_length": 3}),
        ("e2vpt", {"length": 6, "kv_length": 0, "masks": "learned"}),
        ("e2vpt", {"length": 6, "kv_length": 0, "form": "naive"}),
        ("e2vpt", {"length": 6, "kv_length": 3, "form": "naive"}),
        ("e2vpt", {"length": 6, "pruned": (2, 5)}),
        ("e2vpt", {"length": 6, "pruned": (2, 5), "form": "naive"}),
        ("e2vpt", {"length": 6, "pruned": (4, 0), "removal": "removed"}),
        ("e2vpt", {"length": 6, "pruned": (4, 12), "removal": "removed", "form": "naive", "kv_length": 0}),
    ],
)
def test_against_the_formula(method, options):
    model = shaken(create(backbone("vit"), method, num_classes=4, **options)).double().eval()
    x = images(model, dtype=torch.float64)
    found = getattr(peer_reference, method)(model, x)
    torch.testing.assert_close(model(x), found, rtol=0, atol=1e-12)
    if method != "ssf":  # ssf's own backbone carries the method
        plain = create(model.backbone, "probe", num_classes=4).double()
        plain.head.load_state_dict(model.head.state_dict())
        assert (plain(x) - found).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["adaptformer", "houlsby", "lora", "dyt", "ssf", *OWNERS])
def test_first_function(method):
    """A new model computes what its backbone does, under SSF nearly."""
    frozen = backbone("vit")
    model = build("vit", method, frozen, **({"threshold": -1.0} if method == "dyt" else {})).eval()
    probe = create(frozen, "probe", num_classes=4)
    probe.head.load_state_dict(model.head.state_dict())
    x = images(model)
    distance = (model(x) - probe(x)).abs().max() / probe(x).abs().max()
    assert 1e-3 < distance < 0.5 if method == "ssf" else distance < 1e-5


def test_first_values():
    wide = {"embed_dim": 192, "num_heads": 3}
    frozen = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, **wide)
    lora = create(frozen, "lora", num_classes=2, rank=64)
    assert (lora.B == 0).all() and lora.A.abs().max() <= 192**-0.5
    assert lora.A.std().item() == pytest.approx(192**-0.5 / math.sqrt(3), rel=0.02)
    for method, adapters in (("adaptformer", "adapters"), ("houlsby", "after_mlp"), ("dyt", "adapters")):
        for one in getattr(create(frozen, method, num_classes=2, rank=64), adapters):
            assert (one.up.weight == 0).all() and (one.up.bias == 0).all() and (one.down.bias == 0).all()
            assert 0.99 * 192**-0.5 < one.down.weight.abs().max() <= 192**-0.5
    dyt = create(frozen, "dyt", num_classes=2)
    assert all((d.bias == 0).all() and 0 < d.weight.std() < 0.03 for d in dyt.dispatchers)
    apt = create(frozen, "apt", num_classes=2)
    assert abs(apt.P.std() - 0.02) < 1e-3 and abs(apt.A.std() - 1) < 0.1
    assert (apt.B == 0).all() and (apt.s == 0).all()
    ssf = create(frozen, "ssf", num_classes=2)
    scales = torch.cat([c.scale for c in ssf.changes.values()])
    shifts = torch.cat([c.shift for c in ssf.changes.values()])
    assert abs(scales.mean() - 1) < 2e-3 and abs(scales.std() - 0.02) < 1e-3
    assert abs(shifts.mean()) < 2e-3 and abs(shifts.std() - 0.02) < 1e-3
    cvpt = create(frozen, "cvpt", num_classes=2, length=50)
    bound = math.sqrt(6 / (192 * (50 + 2)))
    assert 0.99 * bound < cvpt.prompts.abs().max() <= bound
    e2vpt = create(frozen, "e2vpt", num_classes=2, kv_length=40)
    bound = math.sqrt(6 / (40 * 64))
    assert 0.99 * bound < e2vpt.kv_prompts.abs().max() <= bound
    for method in ("vfpt", "e2vpt"):
        prompts = create(frozen, method, num_classes=2, length=50).prompts
        assert 0.99 * 0.0791 < prompts.abs().max() <= 0.0791
