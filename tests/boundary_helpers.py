# ruff: noqa: E501
"""A tiny trained run, a set of images, values that nobody means, and the promise that a command line keeps."""

import atexit
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from training_helpers import TINY, write_images

from lion_fast.commands.main import main

# 1: what the suite runs, the same everywhere. LION_FAST_FUZZ=50: some 20,000 inputs, new ones each time.
SCALE = int(os.environ.get("LION_FAST_FUZZ", "1"))
CODES = {"experiment": {0, 1, 2, 3}, "bench": {0, 1, 2, 4}}


def some(count: int):
    """Settings of a property: so many inputs in the suite."""
    return settings(
        max_examples=count * SCALE,
        derandomize=SCALE == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@cache
def world() -> Path:
    """A folder with `images/`, `list.csv`, `tiny.safetensors` and `run/`, a trained LION; never changed."""
    root = Path(tempfile.mkdtemp(prefix="boundary-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_images(root / "images", classes=2, each=6)
    lines = [f"images/class{k}/00{i}.png,class{k}" for k in (0, 1) for i in range(6)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    save_file(model.state_dict(), root / "tiny.safetensors")
    torch.save(model.state_dict(), root / "tiny.pth")
    np.savez(root / "tiny.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
    code, _, error = told("finetune", root / "images", "--out", root / "run", *MODEL(root), *SHORT)
    assert code == 0, error
    return root


def MODEL(root: Path) -> list[str]:
    """Flags of the tiny backbone."""
    sets = [f"--backbone-set={key}={value}" for key, value in TINY.items()]
    return [
        "--backbone",
        "vit_tiny_patch16_224",
        "--weights",
        f"{root}/tiny.safetensors",
        "--img-size=32",
        *sets,
    ]


SHORT = ["--set=state_dim=4", "--epochs=1", "--device=cpu", "--no-progress"]


@contextmanager
def scratch():
    """A folder for one input."""
    folder = tempfile.mkdtemp(prefix="boundary-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def told(*argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([os.fspath(a) if isinstance(a, Path) else str(a) for a in argv])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.buffer.getvalue().decode("utf-8", "surrogateescape"), err.buffer.getvalue().decode()


def _not_json(name: str):
    raise AssertionError(f"{name} is no JSON")


def keeps_its_promise(*argv, codes: set[int] | None = None) -> tuple[int, str, str]:
    """`told`, after all that is promised of every command line was looked at."""
    argv = [str(a) for a in argv]
    command = argv[0] if argv else ""
    code, out, err = told(*argv)
    where = f"{argv}\ncode {code}\n{out[-500:]}\n{err[-2000:]}"
    assert code in (codes or CODES.get(command, {0, 1, 2})), where
    assert "Traceback" not in err and "Traceback" not in out, where
    lines = err.rstrip("\n").split("\n")
    if code in (1, 2) and argv and "usage: lion-fast" not in out:
        assert re.match(r"lion-fast(?: \w+)?: error: ", lines[-1]), where
        assert 30 < len(lines[-1]) < 1200 and lines[-1].isprintable(), where
    if "--json" in argv and not {"--help", "-h", "--version"} & set(argv):
        if code == 0:
            json.loads(out, parse_constant=_not_json)
        else:
            assert not out, where
    return code, out, err


def picture(folder: Path) -> dict[str, str]:
    """What lies in a folder: names and contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- values

TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "-",
            "--",
            "~",
            ".",
            "..",
            "/",
            "\\",
            "a\nb",
            "\x1b[2J",
            "\ud800",
            "\udcff",
            "ü",
            "😀",
            "a" * 5000,
        ]
        + [
            "nan",
            "inf",
            "-inf",
            "null",
            "true",
            "yes",
            "1e3",
            "0x10",
            "1_0",
            "0b1",
            "١",
            "[1]",
            "{a: 1}",
            "*a",
            "&a",
        ]
        + [
            "none",
            "cpu",
            "cuda",
            "meta",
            "cuda:99",
            "mps",
            "/dev/null",
            "/dev/zero",
            "/nowhere/x",
            "%s",
            "%(x)s",
        ]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
)
WHOLES = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64, 10**22, 10**400])
FLOATS = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e308, 1e-3, float("inf"), float("nan")])
PLAIN = st.one_of(st.none(), st.booleans(), WHOLES, FLOATS, TEXTS)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("abk01", max_size=3), inner, max_size=3),
    max_leaves=5,
)


def changed(value, draw):
    """A JSON value with one place changed: another value, one less, one more."""
    places = [()]

    def walk(at, inner):
        for key in inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((*at, key))
            walk((*at, key), inner[key])

    walk((), value)
    place, how = draw(st.sampled_from(places)), draw(st.sampled_from(["put", "put", "drop", "add"]))
    new = draw(VALUES)
    if not place:
        return new
    value = json.loads(json.dumps(value))
    at = value
    for key in place[:-1]:
        at = at[key]
    if how == "drop":
        del at[place[-1]]
    elif how == "add" and isinstance(at, dict):
        at[draw(TEXTS)] = new
    else:
        at[place[-1]] = new
    return value


def edited(data: bytes, draw) -> bytes:
    """Bytes with a few edits."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat"]))
        more = draw(st.binary(min_size=1, max_size=8))
        if how == "flip":
            data = (
                data[:at]
                + bytes(a ^ b for a, b in zip(data[at : at + len(more)], more, strict=False))
                + data[at + len(more) :]
            )
        elif how == "cut":
            data = data[:at]
        elif how == "drop":
            data = data[:at] + data[at + len(more) :]
        elif how == "insert":
            data = data[:at] + more + data[at:]
        else:
            data = data[:at] + data[at : at + 40] * 2 + data[at + 40 :]
    return data
