"""Imports run down the ladder only, and in no circle; those inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room sees the floors below its own, and nothing of its neighbours.
LADDER = (
    ("errors",),
    ("options", "files"),
    ("lion_kernels",),
    ("equilibrium",),
    ("pruning", "backbones", "data"),
    ("methods",),
    ("adapters", "training", "inspection"),
    ("studies",),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(LADDER) for room in rooms}
# data is lower than its neighbours: it knows nothing of models
ONLY = {"data": {"errors", "options", "files"}, "lion_kernels": set()}


def modules():
    """{dotted name: syntax tree} of both packages."""
    found = {}
    for root in (ROOT, ROOT / "kernels"):
        for path in sorted(root.glob("lion_*/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imported(name):
    """The modules of both packages that a module names in an import, wherever it stands."""
    package = "__init__" if name in {m.rpartition(".")[0] for m in MODULES} else name.rpartition(".")[0]
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lion_"))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relative to {package}: say the whole name"
            if (node.module or "").split(".")[0] in ("lion_fast", "lion_kernels"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole not in ("lion_fast.__version__", "lion_fast"):
                        yield whole if whole in MODULES else node.module


def room(name):
    """The room of a module: `lion_kernels`, or the first name below `lion_fast`; "" for the front door."""
    parts = name.split(".")
    return parts[0] if parts[0] == "lion_kernels" else (parts[1] if len(parts) > 1 else "")


EDGES = {name: sorted(set(imported(name))) for name in MODULES}
# The front door and `python -m` stand outside: the one opens every room when asked, the other a command.
INSIDE = [name for name in MODULES if name not in ("lion_fast", "lion_fast.__main__")]


def test_every_room_has_its_place_on_the_ladder():
    assert {room(name) for name in INSIDE} == set(FLOOR)


def test_imports_run_down_only():
    upward = set()
    for name in INSIDE:
        for other in EDGES[name]:
            mine, theirs = room(name), room(other)
            allowed = mine == theirs or (theirs and FLOOR[theirs] < FLOOR[mine])
            if mine in ONLY and mine != theirs:
                allowed = theirs in ONLY[mine]
            if not allowed:
                upward.add((name, other))
    assert not upward, sorted(upward)


def circles():
    """Groups of modules that import one another."""
    index, low, stack, on, found = {}, {}, [], set(), []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        on.add(name)
        for other in EDGES[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in on:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = set()
            while not group or name not in group:
                group.add(stack.pop())
            on.difference_update(group)
            if len(group) > 1:
                found.append(frozenset(group))

    for name in INSIDE:
        if name not in index:
            visit(name)
    return found


def test_no_circles():
    assert not circles()


def test_nothing_in_the_packages_imports_the_bench():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in named if n.split(".")[0] in ("bench", "tests", "kernels")], name


@pytest.mark.parametrize("module", ["lion_fast", "lion_fast.equilibrium", "lion_fast.commands.main"])
def test_importing_a_ground_floor_loads_nothing_heavy(module):
    heavy = ("timm", "accelerate", "matplotlib", "torchvision", "triton", "lion_fast.pruning")
    code = f"import {module}, sys; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


def test_the_equilibrium_stands_alone():
    code = "import lion_fast.equilibrium, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    rooms = {room(name) for name in done.stdout.split() if name.startswith("lion_fast.")}
    assert done.returncode == 0 and rooms == {"equilibrium", "errors"}, done.stderr
