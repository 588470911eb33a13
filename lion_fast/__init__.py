"""Implicit vision prompt tuning: equilibrium layers at the ends of a frozen backbone.

Importing the package needs torch alone; timm, torchvision and the training
dependencies are imported when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors
    from lion_fast import adapters as adapters
    from lion_fast import backbones as backbones
    from lion_fast import data as data
    from lion_fast import errors as errors
    from lion_fast import methods as methods
    from lion_fast import pruning as pruning
    from lion_fast import training as training
    from lion_fast.adapters import load_adapter as load_adapter
    from lion_fast.adapters import save_adapter as save_adapter
    from lion_fast.backbones import load_backbone as load_backbone
    from lion_fast.backbones import weights as weights
    from lion_fast.data import load_data as load_data
    from lion_fast.equilibrium import contraction as contraction
    from lion_fast.equilibrium import functional as functional
    from lion_fast.equilibrium import layer as layer
    from lion_fast.equilibrium import reference as reference
    from lion_fast.equilibrium import solvers as solvers
    from lion_fast.equilibrium.layer import LionLayer as LionLayer
    from lion_fast.equilibrium.reference import replace_layers as replace_layers
    from lion_fast.equilibrium.solve import SolveInfo as SolveInfo
    from lion_fast.equilibrium.solvers import ImplicitLayer as ImplicitLayer
    from lion_fast.methods import create as create
    from lion_fast.methods.lion import LionModel as LionModel

__version__ = "0.1.0"

# The public names: those of a module, and modules.
_WHERE = {
    "LionLayer": "lion_fast.equilibrium.layer",
    "replace_layers": "lion_fast.equilibrium.reference",
    "ImplicitLayer": "lion_fast.equilibrium.solvers",
    "SolveInfo": "lion_fast.equilibrium.solve",
    "LionModel": "lion_fast.methods.lion",
    "create": "lion_fast.methods",
    "load_backbone": "lion_fast.backbones",
    "load_adapter": "lion_fast.adapters",
    "save_adapter": "lion_fast.adapters",
    "load_data": "lion_fast.data",
}
_MODULES = {
    **{n: f"lion_fast.{n}" for n in "adapters backbones data errors methods pruning training".split()},
    **{n: f"lion_fast.equilibrium.{n}" for n in "contraction functional layer reference solvers".split()},
    "weights": "lion_fast.backbones.weights",
}

__all__ = ["__version__", *_WHERE, *_MODULES]

if not TYPE_CHECKING:  # a checker would take any name for one that this finds

    def __getattr__(name: str):
        if name in _WHERE:
            value = getattr(import_module(_WHERE[name]), name)
        elif name in _MODULES:
            value = import_module(_MODULES[name])
        else:
            raise AttributeError(f"module 'lion_fast' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
