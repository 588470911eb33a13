"""VPT where published code and ours can differ: the border's pixels, prompts in a mean over tokens."""

from pathlib import Path

import pytest
import torch
from method_helpers import backbone, described, images, shaken

from lion_fast.adapters import load_adapter
from lion_fast.backbones import load_backbone
from lion_fast.errors import AdapterError, OptionError
from lion_fast.methods import VPT, create, vpt_swin
from lion_fast.methods.files import read_adapter

NORMALISED = Path(__file__).parent / "normalised_border"  # written before a border held pixels


def framed(x, top, bottom, left, right):
    middle = torch.cat([left.expand(len(x), -1, -1, -1), x, right.expand(len(x), -1, -1, -1)], -1)
    top, bottom = (part.expand(len(x), -1, -1, -1) for part in (top, bottom))
    return torch.cat([top, middle, bottom], -2)


def published(pixels, frozen, x, p):
    """Images with a border of pixels in [0, 1], normalised in every forward."""
    mean, std = (torch.tensor(v).to(x.dtype).view(3, 1, 1) for v in (frozen.mean, frozen.std))
    rows, columns = ((part - mean) / std for part in pixels)
    return framed(x, rows[:, :p], rows[:, p:], columns[..., :p], columns[..., p:])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_moves_the_border_as_the_published_one(decay):
    frozen = backbone("resnet").double()
    model = VPT(frozen, 4, length=3).double()
    x, labels = images(model, 4, torch.float64), torch.tensor([0, 1, 2, 3])
    pixels = [
        p.detach().clone().requires_grad_() for p in (model.border.row_pixels, model.border.column_pixels)
    ]
    assert all(0 <= p.min() and p.max() <= 1 for p in pixels)
    cross_entropy = torch.nn.functional.cross_entropy
    for _ in range(2):
        ours = torch.optim.SGD([model.border.row_pixels, model.border.column_pixels], 0.5, weight_decay=decay)
        theirs = torch.optim.SGD(pixels, 0.5, weight_decay=decay)
        ours.zero_grad(), theirs.zero_grad()
        cross_entropy(model(x), labels).backward()
        cross_entropy(model.head(frozen(published(pixels, frozen, x, 3))), labels).backward()
        ours.step(), theirs.step()
        for own, other in zip((model.border.row_pixels, model.border.column_pixels), pixels, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.border.rows[:, 0, 0], published(pixels, frozen, x, 3)[0, :, 0, 0])


def test_a_border_saved_normalised_gives_the_same_outputs(tmp_path):
    frozen = load_backbone(
        "resnet18", pretrained=False, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), img_size=8
    )
    _, old = read_adapter(NORMALISED)
    assert {"border.rows", "border.columns"} < old.keys()
    model = load_adapter(NORMALISED, frozen, allow_other_backbone=True)
    x, rows, columns = images(model), old["border.rows"], old["border.columns"]
    whole = framed(x, rows[:, :1], rows[:, 1:], columns[..., :1], columns[..., 1:])
    expected = frozen(whole) @ old["head.weight"].T + old["head.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    # saved again it holds pixels; a whole state of then is read too
    model.save_adapter(tmp_path)
    assert {"border.row_pixels", "border.column_pixels"} < read_adapter(tmp_path)[1].keys()
    torch.testing.assert_close(load_adapter(tmp_path, frozen)(x), model(x), rtol=0, atol=0)
    other = create(frozen, "vpt", num_classes=2, length=1)
    whole = {k: v for k, v in other.state_dict().items() if not k.startswith(("border.", "head."))} | old
    other.load_state_dict(whole)
    torch.testing.assert_close(other.eval()(x), model(x), rtol=0, atol=0)
    with pytest.raises(AdapterError, match=r"border.row"):
        other.load_adapter_state_dict(old | {"border.rows": torch.zeros(2, 3)})


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("key, pool", [("avg", "backbone"), ("vit", "mean"), ("registers", "cls+mean")])
def test_prompts_in_the_mean_of_a_vit(key, pool, depth):
    """MAE as published: the mean over everything behind the class token."""
    frozen = backbone(key)
    model = shaken(VPT(frozen, 4, depth=depth, length=5, pool=pool, prompt_pooling=True)).double().eval()
    assert model.form == "naive"
    x = images(model, dtype=torch.float64)
    rows, head = frozen.enter(x), frozen.num_prefix_tokens
    for i, block in enumerate(frozen.blocks):
        if i == 0:
            rows = torch.cat([rows[:, :head], model.prompts[0].expand(3, -1, -1), rows[:, head:]], 1)
        elif depth == "deep":
            rows = torch.cat([rows[:, :head], model.prompts[i].expand(3, -1, -1), rows[:, head + 5 :]], 1)
        rows = block(rows)
    rows = frozen.norm(rows)
    parts = [frozen.model.fc_norm(rows[:, head:].sum(1) / (rows.shape[1] - head))]
    parts = [frozen.model.fc_norm(rows[:, 0]), *parts] if pool == "cls+mean" else parts
    expected = model.head(torch.cat(parts, -1))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    without = create(frozen, "vpt", num_classes=4, depth=depth, length=5, pool=pool).double().eval()
    without.load_adapter_state_dict(model.adapter_state_dict())
    assert (without(x) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("key", ["swin", "swinv2"])
@pytest.mark.parametrize("pool", ["backbone", "mean"])
def test_prompts_in_the_mean_of_a_swin(key, pool):
    frozen = backbone(key)
    model = shaken(VPT(frozen, 4, length=3, pool=pool, prompt_pooling=True)).double().eval()
    x = images(model, dtype=torch.float64)
    rows = frozen.enter(x)
    for s, stage in enumerate(frozen.model.layers):
        rows = stage.downsample(rows)
        for i, block in enumerate(stage.blocks):
            rows, prompts = vpt_swin.carry_block(block, rows, model.prompts[s][i].expand(3, -1, -1))
    norm = frozen.model.norm
    both = norm(rows).sum((1, 2)) + norm(prompts).sum(1)
    expected = model.head(both / (rows.shape[1] * rows.shape[2] + 3))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "key, options",
    [
        ("vit", {}),  # reads the class token
        ("vit", {"pool": "cls"}),
        ("avg", {"form": "exact"}),
        ("swin", {"depth": "shallow"}),
        ("swin", {"form": "exact"}),
        ("resnet", {}),
        ("avg", {"state_dim": 4}),
    ],
)
def test_prompts_in_a_mean_that_is_not_there(key, options):
    with pytest.raises(OptionError, match="prompt_pooling|state_dim"):
        create(backbone(key), "vpt", num_classes=2, prompt_pooling=True, **options)


def test_pooling_of_prompts_is_written_down_where_it_is_not_the_default(tmp_path):
    frozen = backbone("avg")
    for pooled in (True, False):
        model = shaken(create(frozen, "vpt", num_classes=2, prompt_pooling=pooled)).eval()
        model.save_adapter(tmp_path)
        assert described(tmp_path)["options"].get("prompt_pooling", False) is pooled
        again = load_adapter(tmp_path, frozen)
        assert again.prompt_pooling is pooled and torch.equal(again(x := images(model)), model(x))
