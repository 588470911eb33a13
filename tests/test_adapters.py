"""Adapters: a round trip keeps every bit; what is foreign, damaged or unfit is refused with a reason."""

import os
import stat

import pytest
import safetensors.torch
import torch
from method_helpers import BACKBONES, FAMILIES, backbone, described, images, replace_tensors, rewrite, shaken
from training_helpers import same_bits

import lion_fast
from lion_fast.adapters import load_adapter, save_adapter
from lion_fast.backbones import load_backbone
from lion_fast.errors import AdapterError, WeightsError
from lion_fast.methods import available, create
from lion_fast.methods.files import DESCRIPTION, FORMAT_VERSION, TENSORS, read_adapter

KIND = {"vit": "vit", "swin": "swin", "resnet": "cnn"}
MODELS = [  # every method on every family it works on, and options that change what is saved
    *((m, key, {}) for m, cls in available().items() for key in FAMILIES if KIND[key] in cls.families),
    ("lion", "vit", {"form": "residual", "recurrence": "tied", "ends": ("output",), "tol": 1e-3}),
    ("lion", "vit", {"at": 0, "grid": 2, "gamma": 0.7, "ends": ("input", "output"), "pool": "mean"}),
    ("lion", "vit", {"form": "residual", "pool": "cls+mean"}),
    ("lion", "vit", {"at": (2, 0), "grid": 2, "pooled": False, "state_dim": 8}),
    ("lion", "resnet", {"ends": ("input", "output"), "front": "residual"}),
    ("lion", "swin", {"at": []}),
    ("probe", "resnet", {"at": (1, 3), "reading": "auto"}),
    ("lion", "swin", {"activation": "gelu", "form": "residual"}),
    ("lion", "resnet", {"pixel_channels": 4, "gamma": 0.7, "form": "residual"}),
    ("vpt", "vit", {"length": 3, "dropout": 0.1, "form": "naive"}),
    ("vpt", "vit", {"depth": "shallow"}),
    ("vpt", "vit", {"state_dim": 4, "length": 2}),
    ("probe", "swin", {"head_bias": False}),
    ("probe", "vit", {"grid": 3}),
    ("ssf", "swinv2", {}),
    ("vpt", "registers", {}),
]


def trained(method="lion", key="vit", on=None, num_classes=4, **options):
    """A model whose every adapter tensor differs from its initial value."""
    return shaken(create(on or backbone(key), method, num_classes=num_classes, **options)).eval()


def refused(match, *args, error=AdapterError, **options):
    with pytest.raises(error, match=match):
        load_adapter(*args, **options)


@pytest.fixture
def probe(tmp_path):
    """A probe, saved in `tmp_path`."""
    model = trained("probe")
    save_adapter(model, tmp_path)
    return model


@pytest.fixture
def residual(tmp_path):
    """LION with both ends, saved in `tmp_path`."""
    model = trained(form="residual")
    save_adapter(model, tmp_path)
    return model


@pytest.mark.parametrize("method, key, options", MODELS)
def test_round_trip_is_bit_exact(method, key, options, tmp_path):
    frozen = backbone(key)
    model = trained(method, on=frozen, **options)
    model.classes = ["a", "b", "ç", "d"]
    folder = tmp_path / "new" / "folder"
    model.save_adapter(folder)
    assert sorted(os.listdir(folder)) == [DESCRIPTION, TENSORS]
    state = torch.get_rng_state()
    again = lion_fast.load_adapter(folder, backbone=frozen)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model) and again.options == model.options and again.classes == model.classes
    assert same_bits(again.adapter_state_dict(), model.adapter_state_dict())
    x = images(model)
    assert torch.equal(again(x), model(x)) and not again.training
    assert again.num_trainable(head=True) == model.num_trainable(head=True)
    assert again.backbone_differs is False


def test_description_and_size(tmp_path):
    vit = load_backbone("vit_base_patch16_224", pretrained=False, depth=1)
    model = create(vit, num_classes=10, state_dim=51, form="residual")
    model.classes = [f"class {i}" for i in range(10)]
    save_adapter(model, tmp_path)
    found, state = read_adapter(tmp_path)
    assert found["format_version"] == 1 and found["method"] == "lion"
    assert found["options"]["state_dim"] == 51 and found["options"]["ends"] == ["input", "output"]
    assert found["num_classes"] == 10 and found["classes"] == model.classes
    assert found["backbone"]["name"] == "vit_base_patch16_224" and found["backbone"]["img_size"] == 224
    assert found["backbone"]["sha256"] == vit.weights_sha256
    assert found["backbone"]["weights_source"] == "random"
    assert found["normalisation"] == {
        "mean": list(vit.mean),
        "std": list(vit.std),
        "interpolation": vit.interpolation,
        "crop_pct": vit.crop_pct,
        "resize": "crop",
    }
    assert found["parameters"] == {"method": 163_512, "with_head": 171_202}
    assert {"lion_fast", "torch", "timm"} <= found["versions"].keys()
    assert sum(v.numel() for v in state.values()) == 171_202
    size = sum((tmp_path / name).stat().st_size for name in (TENSORS, DESCRIPTION))
    assert 171_202 * 4 < size < 171_202 * 4 + 8_000
    assert not any(k.startswith("backbone") for k in state)


def test_saved_by_the_dtype_it_has_and_loaded_into_any(tmp_path):
    model = trained().bfloat16()
    save_adapter(model, tmp_path)
    head = load_adapter(tmp_path, backbone=model.backbone.float()).head
    assert torch.equal(head.weight, model.head.weight.float()) and head.weight.dtype == torch.float32


def test_a_second_save_replaces_the_first(tmp_path):
    first, second = trained(), trained("vpt")
    (tmp_path / "notes.txt").write_text("kept")
    save_adapter(first, tmp_path)
    save_adapter(second, tmp_path)
    assert load_adapter(tmp_path, backbone=second.backbone).method == "vpt"
    assert sorted(os.listdir(tmp_path)) == [DESCRIPTION, TENSORS, "notes.txt"]
    # a crash between the two moves: tensors of one save beside the description of another
    tensors = (tmp_path / TENSORS).read_bytes()
    save_adapter(first, tmp_path)
    (tmp_path / TENSORS).write_bytes(tensors)
    refused("from another save", tmp_path, backbone=first.backbone)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_adapter(step, tmp_path, monkeypatch):
    model, other = trained(), trained()
    save_adapter(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (TENSORS, DESCRIPTION)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(AdapterError, match=f"cannot be written to {tmp_path}: No space left on device"):
        save_adapter(other, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [DESCRIPTION, TENSORS]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_unwritable_places(tmp_path):
    model = trained("probe")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot be written to .*file.*give a writable directory"):
        save_adapter(model, tmp_path / "file")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(AdapterError, match="Permission denied"):
        save_adapter(model, locked)


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = trained(form="residual")
    model.output_end.V.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="output_end.V hold NaN or Inf"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# backbones


def test_another_backbone_is_refused(tmp_path, residual):
    other = backbone()
    told = f"weights {residual.backbone.weights_sha256[:12]}.*allow_other_backbone=True"
    refused(told, tmp_path, backbone=other)
    again = load_adapter(tmp_path, backbone=other, allow_other_backbone=True)
    assert again.backbone_differs is True and again.backbone is other
    assert torch.equal(again.input_end.A, residual.input_end.A)
    # allowed is not enough where it cannot fit
    told = "adapter.safetensors: the adapter's head is 4 classes from 48 features"
    refused(told, tmp_path, backbone=backbone(embed_dim=96), allow_other_backbone=True)
    save_adapter(trained("apt"), tmp_path)
    told = "cannot be built: method apt works on vit backbones"
    refused(told, tmp_path, backbone=backbone("resnet"), allow_other_backbone=True)


def test_other_images_are_another_backbone(tmp_path):
    model = trained("probe", "resnet")
    save_adapter(model, tmp_path)
    other, same = backbone("resnet", img_size=96), backbone("resnet")
    for net in (other, same):
        net.model.load_state_dict(model.backbone.model.state_dict())
    refused("images with img_size 64; this backbone takes 96", tmp_path, backbone=other)
    assert load_adapter(tmp_path, backbone=other, allow_other_backbone=True).backbone is other
    assert load_adapter(tmp_path, backbone=same).backbone is same
    same.mean = (0.5, 0.5, 0.5)
    refused("images with mean", tmp_path, backbone=same)


@pytest.mark.parametrize("key", FAMILIES)
def test_the_backbone_is_built_again_from_its_file(key, tmp_path):
    name, kwargs = BACKBONES[key]
    safetensors.torch.save_file(backbone(key).model.state_dict(), tmp_path / "w.safetensors")
    model = trained(on=load_backbone(name, weights=tmp_path / "w.safetensors", **kwargs))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter")
    x = images(model)
    assert again.backbone is not model.backbone and torch.equal(again(x), model(x))
    assert again.backbone.img_size == model.backbone.img_size

    # other weights under the same name
    safetensors.torch.save_file(backbone(key).model.state_dict(), tmp_path / "w.safetensors")
    refused("Give the backbone it was trained on", tmp_path / "adapter")
    (tmp_path / "w.safetensors").unlink()
    refused("w.safetensors' is not here; give the file .*weights=FILE", tmp_path / "adapter")
    # the file has moved
    safetensors.torch.save_file(model.backbone.model.state_dict(), tmp_path / "moved.safetensors")
    moved = load_adapter(tmp_path / "adapter", weights=tmp_path / "moved.safetensors")
    assert torch.equal(moved(x), model(x))


def test_a_backbone_that_cannot_be_had(tmp_path, probe, monkeypatch):
    import huggingface_hub.constants

    refused("random weights; give the file .*backbone=load_backbone", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    saved = described(tmp_path)["backbone"]
    saved["request"]["pretrained"] = True
    rewrite(tmp_path, backbone=saved)
    refused("give weights=FILE", tmp_path, error=WeightsError)
    probe.backbone.request = None  # wrapped by hand
    save_adapter(probe, tmp_path)
    refused("not built by load_backbone", tmp_path)
    assert torch.equal(load_adapter(tmp_path, backbone=probe.backbone).head.weight, probe.head.weight)


@pytest.mark.parametrize(
    "request_, error, match",
    [
        ({"name": "hf-hub:somebody/something"}, AdapterError, "is not a plain timm model"),
        (
            {"timm_kwargs": {"pretrained_cfg_overlay": {"url": "https://example.org/x.pth"}}},
            AdapterError,
            "no option 'pretrained_cfg_overlay'",
        ),
        ({"timm_kwargs": {"checkpoint_path": "x.pth"}}, AdapterError, "no option 'checkpoint_path'"),
        ({"name": "nothing"}, AdapterError, "no backbone named"),
    ],
)
def test_a_foreign_description_reaches_no_address_and_no_loader_option(
    tmp_path, probe, request_, error, match
):
    saved = described(tmp_path)["backbone"]
    rewrite(tmp_path, backbone=saved | {"request": saved["request"] | {"pretrained": True} | request_})
    refused(match, tmp_path, error=error)


# files


def test_missing_and_truncated_files(tmp_path, probe):
    refused(f"no {DESCRIPTION} in .*give a directory that save_adapter wrote", tmp_path / "none")
    for name in (DESCRIPTION, TENSORS):
        save_adapter(probe, tmp_path)
        whole = (tmp_path / name).read_bytes()
        for length in (0, 4, len(whole) // 2, len(whole) - 3):
            (tmp_path / name).write_bytes(whole[:length])
            refused(f"{name}.*(truncated|not JSON)", tmp_path, backbone=probe.backbone)
        (tmp_path / name).unlink()
        refused(f"no {name} in", tmp_path, backbone=probe.backbone)


def test_one_flipped_bit_is_noticed(tmp_path, probe):
    raw = bytearray((tmp_path / TENSORS).read_bytes())
    raw[-5] ^= 1
    (tmp_path / TENSORS).write_bytes(raw)
    refused(f"{TENSORS} is not the one {DESCRIPTION} describes", tmp_path, backbone=probe.backbone)


@pytest.mark.parametrize("content", ["[]", "{}", '{"r": 8, "peft_type": "LORA"}', "null", '"text"'])
def test_foreign_descriptions(content, tmp_path, probe):
    (tmp_path / DESCRIPTION).write_text(content)
    refused("does not describe a lion-fast adapter", tmp_path, backbone=probe.backbone)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"format_version": FORMAT_VERSION + 1}, "format version 3; .* reads up to 2"),
        ({"format_version": "new"}, "format_version"),
        ({"method": "tomorrow"}, "'tomorrow'"),
        ({"method": None}, "method"),
        ({"options": [1]}, "options"),
        ({"options": {"lenght": 3}}, "lenght"),
        ({"options": {"backbone": "x"}}, "cannot be built"),
        ({"num_classes": 5}, "num_classes=5"),
        ({"classes": ["a"]}, "classes"),
        ({"backbone": {}}, "sha256"),
        ({"normalisation": {"mean": "x", "std": [1]}}, "normalisation mean"),
        ({"tensors_sha256": None}, "tensors_sha256"),
    ],
)
def test_descriptions_that_do_not_fit(change, match, tmp_path, probe):
    rewrite(tmp_path, **change)
    refused(match, tmp_path, backbone=probe.backbone)


def test_an_adapter_from_before_lion_had_forms_is_residual(tmp_path, residual):
    options = described(tmp_path)["options"]
    rewrite(tmp_path, options={k: v for k, v in options.items() if k not in ("form", "at", "grid")})
    again = load_adapter(tmp_path, backbone=residual.backbone)
    x = images(residual)
    assert again.form == "residual" and torch.equal(again(x), residual(x))


def test_tensors_that_do_not_fit(tmp_path, residual):
    state = {k: v.detach().clone() for k, v in residual.adapter_state_dict().items()}
    for change, match in (
        ({"input_end.A": torch.full((32, 48), float("inf"))}, "input_end.A holds NaN or Inf"),
        ({"input_end.A": torch.zeros(2, 2)}, r"input_end.A of the adapter is \(2, 2\); .* \(32, 48\)"),
        ({"backbone.model.norm.weight": torch.zeros(48)}, "holds unknown backbone.model.norm.weight"),
        ({"head.weight": torch.zeros(9, 48)}, "a head of 9 outputs"),
    ):
        replace_tensors(tmp_path, state | change)
        refused(f"{tmp_path}.*{match}", tmp_path, backbone=residual.backbone)
    replace_tensors(tmp_path, {k: v for k, v in state.items() if k != "output_end.b"})
    refused("lacks output_end.b", tmp_path, backbone=residual.backbone)
    replace_tensors(tmp_path, {"weight": torch.zeros(3)})
    refused("has no head", tmp_path, backbone=residual.backbone)


def test_num_classes_that_are_needed(tmp_path, probe):
    assert load_adapter(tmp_path, backbone=probe.backbone, num_classes=4).num_classes == 4
    refused("has num_classes=4; 7 are needed here", tmp_path, backbone=probe.backbone, num_classes=7)


def test_no_pickle_is_executed(tmp_path, probe):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    torch.save({"head.weight": Evil()}, tmp_path / TENSORS)
    refused("not a readable safetensors file", tmp_path, backbone=probe.backbone)
    assert not (tmp_path / "ran").exists()


def test_given_a_device(tmp_path, probe):
    again = load_adapter(tmp_path, backbone=probe.backbone, device="meta")
    assert {p.device.type for p in again.parameters()} == {"meta"}


def test_the_crop_mode_of_training_is_kept(tmp_path):
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "img_size": 32}
    name, file = "convnext_tiny.fb_in22k_ft_in1k_384", tmp_path / "w.safetensors"
    random = load_backbone(name, pretrained=False, **small)
    safetensors.torch.save_file(random.model.state_dict(), file)
    squash = load_backbone(name, weights=file, **small)
    assert squash.crop_mode == "squash"
    save_adapter(create(squash, "probe", num_classes=2), tmp_path / "new")
    assert load_adapter(tmp_path / "new").backbone.crop_mode == "squash"
    # written before it was read: the images had been cropped in the middle
    squash.crop_mode = "center"
    save_adapter(create(squash, "probe", num_classes=2), tmp_path / "old")
    assert "crop_mode" not in described(tmp_path / "old")["normalisation"]
    assert load_adapter(tmp_path / "old").backbone.crop_mode == "center"
    refused("crop_mode squash", tmp_path / "new", backbone=squash)
    squash.crop_mode = "squash"
    refused("crop_mode center", tmp_path / "old", backbone=squash)


def test_equal_weights_make_equal_bytes(tmp_path, probe):
    """The header of safetensors has its metadata in any order."""
    written = set()
    for _ in range(8):
        save_adapter(probe, tmp_path)
        written.add((tmp_path / TENSORS).read_bytes() + (tmp_path / DESCRIPTION).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(
    "options", [{"state_dim": 10**6}, {"grid": 10**9}, {"max_iter": 10**22}, {"state_dim": "9"}]
)
def test_nothing_is_allocated_by_the_word_of_a_description(tmp_path, residual, options):
    rewrite(tmp_path, options=described(tmp_path)["options"] | options)
    refused("cannot be built", tmp_path, backbone=residual.backbone)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": [1, 2, 3]}, {"classes": "abc"}, {"compacted": [1]}, {"num_classes": True},
        {"normalisation": {"mean": [1], "std": [None]}}, {"num_classes": 10**30},
        {"options": {"head_bias": 1}}, {"format_version": 1.5}, {"method": "lion\n"},
        {"backbone": {"name": "x", "sha256": "y", "request": 5}},
    ],
)  # fmt: skip
def test_edited_descriptions_are_refused(tmp_path, probe, change):
    rewrite(tmp_path, **change)
    with pytest.raises(AdapterError):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_tensors_of_another_kind_are_refused(tmp_path, probe, kind):
    state = {k: v.detach().clone() for k, v in probe.adapter_state_dict().items()}
    replace_tensors(tmp_path, state | {"head.bias": torch.zeros(3, dtype=kind)})
    refused("head.bias", tmp_path, backbone=probe.backbone)


@pytest.mark.parametrize("name", [DESCRIPTION, TENSORS])
def test_a_pipe_or_a_loop_of_links_is_no_adapter(tmp_path, probe, name):
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused("cannot be read", tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    refused("cannot be read", tmp_path)
