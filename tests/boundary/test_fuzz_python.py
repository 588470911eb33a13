# ruff: noqa: E501
"""The public names of Python, given anything: an error of ours that says what is wrong, or a result."""

import inspect
from functools import cache

import pytest
import torch
from boundary_helpers import VALUES, scratch, some, world
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import TINY, random_splits, tiny_backbone, tiny_model

import lion_fast
from lion_fast.data import load_data, load_images
from lion_fast.errors import LionError
from lion_fast.methods import available, method_options
from lion_fast.training import TrainConfig, evaluate, fit

DATA = st.data()
ODD = VALUES | st.sampled_from(
    [object(), b"\xff", 1j, torch.zeros(2), int, print, (), {1: 2}, {"a"}, range(3)]
)


def ours_or_done(call, *args, **kwargs):
    """The result, or None after an error of lion_fast with a message in one line."""
    try:
        return call(*args, **kwargs)
    except LionError as error:
        assert str(error).strip()
    except OSError as error:  # a path that is none
        assert error.filename is not None, error
    except (MemoryError, RuntimeError) as error:
        assert "allocate memory" in str(error), error


@some(30)
@given(DATA)
def test_options_of_methods(data):
    method = data.draw(st.sampled_from(sorted(available())))
    option = data.draw(st.sampled_from(sorted(method_options(available()[method]))))
    backbone = tiny_backbone()
    model = ours_or_done(lion_fast.create, backbone, method, num_classes=2, **{option: data.draw(ODD)})
    if model is not None:
        assert ours_or_done(model.eval(), torch.zeros(2, 3, 32, 32)) is not None
        with scratch() as folder:
            lion_fast.save_adapter(model, folder)
            lion_fast.load_adapter(folder, backbone)


@some(15)
@given(DATA)
def test_settings_of_training(data):
    name = data.draw(st.sampled_from(TrainConfig.names()))
    ours_or_done(TrainConfig, **{name: data.draw(ODD)})


@cache
def good_calls() -> dict:
    """Calls that work, by name: what is called, with which arguments."""
    root, model = world(), tiny_model()
    images = load_images(root / "images", classes=["class0", "class1"])
    config = TrainConfig(epochs=1, batch_size=4, device="cpu")
    return {
        "load_backbone": (
            lion_fast.load_backbone,
            {"name": "vit_tiny_patch16_224", "pretrained": False, "weights": f"{root}/tiny.safetensors"}
            | {"img_size": 32, "pool": None, "resize": "crop", "memory": "plain", "fold": False}
            | {"precision": "fp32", **TINY},
        ),
        "create": (
            lion_fast.create,
            {"backbone": tiny_backbone(), "method": "probe", "num_classes": 2, "seed": 0, "weights": None}
            | {"img_size": None, "memory": "plain", "fold": False, "precision": "fp32"},
        ),
        "load_adapter": (
            lion_fast.load_adapter,
            {
                "directory": root / "run/adapter",
                "backbone": None,
                "device": "cpu",
                "num_classes": 2,
                "weights": None,
            },
        ),
        "load_data": (
            load_data,
            {
                "source": root / "images",
                "val": 0.2,
                "test": 0.2,
                "seed": 0,
                "n_per_class": None,
                "scarce": "error",
                "imbalance": None,
                "domain": None,
            }
            | {
                "n_train": None,
                "n_val": None,
                "n_test": None,
                "classes": None,
                "check": "header",
                "strict": False,
            },
        ),
        "load_images": (
            load_images,
            {"source": root / "images", "classes": None, "split": None, "check": "header", "strict": False},
        ),
        "evaluate": (evaluate, {"model": tiny_model(num_classes=2), "dataset": images, "batch_size": 4}),
        "fit": (fit, {"model": model, "splits": random_splits(8, 0), "config": config, "resume": False}),
        "LionLayer": (lion_fast.LionLayer, {"dim": 4, "state_dim": 2}),
    }


@some(20)
@given(DATA)
def test_arguments(data):
    calls = good_calls()
    name = data.draw(st.sampled_from(sorted(calls)))
    call, good = calls[name]
    key = data.draw(st.sampled_from(sorted(good)))
    if key in TINY or (name, key) in {("evaluate", "dataset"), ("fit", "splits")}:
        return
    value = data.draw(ODD)
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        more = {"out_dir": folder / "out"} if name == "fit" else {}
        ours_or_done(call, **{**good, key: value}, **more)


def test_the_calls_are_the_public_ones():
    for call, good in good_calls().values():
        names = inspect.signature(call).parameters
        assert set(good) - set(TINY) <= set(names), call
