"""What gets installed, and what importing it costs."""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lion_fast

ROOT = Path(__file__).parent.parent


def run(code, **options):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the source, so that the build leaves nothing in the checkout."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp), str(source)], check=True, timeout=300)
    (built,) = tmp.glob("*.whl")
    return built


def test_wheel_has_exactly_the_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lion_fast", "lion_kernels"}
    assert {"lion_fast/py.typed", "lion_kernels/py.typed", "lion_kernels/ops.py"} <= set(names)
    files = {
        str(p.relative_to(ROOT)) for kind in ("py", "csv") for p in (ROOT / "lion_fast").rglob(f"*.{kind}")
    }
    assert files <= set(names), "a module or a list is missing from the wheel"


def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        "import importlib.util, lion_fast, lion_kernels, torch\n"
        f"assert all(m.__file__.startswith({str(target)!r}) for m in (lion_fast, lion_kernels))\n"
        "assert all(importlib.util.find_spec(n) is None for n in ('kernels', 'tests', 'bench'))\n"
        "print(tuple(lion_fast.LionLayer(8)(torch.randn(2, 8)).shape))"
    )
    done = run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)})
    assert done.stdout.strip() == "(2, 8)", done.stderr


def test_checkout_folders_are_not_packages():
    code = "import importlib.util; print([importlib.util.find_spec(n) for n in ('kernels', 'tests')])"
    done = run(code, cwd=ROOT.parent)
    assert done.stdout.strip() == "[None, None]", done.stdout + done.stderr
    assert not (ROOT / "kernels/__init__.py").exists()


def test_import_is_light():
    """Neither Triton nor a training dependency, no network, no question to a GPU."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.get_device_capability = refuse\n"
        "before = set(sys.modules)\n"
        "import lion_fast\n"
        "lion_fast.LionLayer(8)(torch.randn(2, 8)).sum().backward()\n"
        "loaded = set(sys.modules) - before\n"
        "heavy = 'triton timm torchvision accelerate yaml matplotlib tqdm safetensors PIL onnx'.split()\n"
        "print([m for m in heavy if m in loaded])"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_name_that_does_not_exist_is_told():
    with pytest.raises(AttributeError, match="no attribute 'LionLayr'"):
        lion_fast.LionLayr  # noqa: B018


def modules():
    return [
        m.name for m in pkgutil.walk_packages(lion_fast.__path__, "lion_fast.") if "__main__" not in m.name
    ]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    """The examples of the public docstrings run and print what they say."""
    names = {"torch": torch, "nn": torch.nn}
    assert doctest.testmod(importlib.import_module(name), extraglobs=names).failed == 0


def code_blocks():
    """The Python in the pages, page by page; blocks behind a comment `<!-- needs ... -->` are left out."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^(<!-- needs .*? -->\n)?```python\n(.*?)^```", text, re.S | re.M)
        code = "\n".join(block for needs, block in blocks if not needs)
        if code:
            yield pytest.param(code, id=page.name)


@pytest.mark.parametrize("code", code_blocks())
def test_code_in_the_pages_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {"__name__": "page"})
