"""What a type checker sees of the public names: their types, and no name that does not exist."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import lion_fast

ROOT = Path(__file__).parents[1]
# torch and the others are not looked into: what is asked is whether this package's own names arrive.
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,timm.*,torchvision.*,accelerate.*,safetensors.*,numpy.*,PIL.*,matplotlib.*,triton.*,yaml.*]
follow_imports = skip
ignore_missing_imports = True
"""
EXAMPLE = """
from typing import Any, assert_type
import torch
import lion_fast
from lion_fast import ImplicitLayer, LionLayer, LionModel, create, functional, load_adapter, load_backbone
from lion_fast import load_data, pruning, reference, replace_layers, solvers
from lion_fast.backbones import Backbone
from lion_fast.data import Splits
from lion_fast.methods import TunedModel

assert_type(lion_fast.LionLayer(8, 4).dim, int)
assert_type(lion_fast.LionLayer, type[LionLayer])
assert_type(load_backbone("vit_tiny_patch16_224"), Backbone)
assert_type(create("vit_tiny_patch16_224", num_classes=2).num_trainable(), int)
assert_type(load_adapter("folder"), TunedModel)
assert_type(load_data("folder"), Splits)
assert_type(pruning.count_parameters(LionLayer(8)), dict[str, int])
assert_type(lion_fast.SolveInfo(torch.zeros(1), torch.zeros(1), 0.1).reason, str)
"""


WRONG = """
from typing import assert_type
import lion_fast
from lion_fast import nothing

lion_fast.nonsense
assert_type(lion_fast.LionLayer(8).dim, str)
"""


def test_public_names_have_their_types_and_others_do_not_exist(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    names = "\n".join(f"lion_fast.{name}" for name in lion_fast.__all__)
    (tmp_path / "right.py").write_text(EXAMPLE + names)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "right.py", "wrong.py", "--python-version", "3.11"]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": path}
    )
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[0] for line in found] == ["wrong.py"] * 3, done.stdout + done.stderr
    for line, word in zip(found, ("nothing", "nonsense", "int"), strict=True):
        assert word in line


def test_checkers_are_told_no_other_names():
    """The imports for type checkers are the names of `__all__`, each from where it comes from when asked."""
    block, _ = (n for n in ast.parse(Path(lion_fast.__file__).read_text()).body if isinstance(n, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told.keys() == set(lion_fast.__all__) - {"__version__"}
    for name, module in told.items():
        own = getattr(lion_fast, name)
        assert getattr(importlib.import_module(module), name) is own
