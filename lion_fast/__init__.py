"""Implicit vision prompt tuning: equilibrium layers at the ends of a frozen backbone.

Importing the package needs torch alone; timm, torchvision and the training
dependencies are imported when a name that needs them is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

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
    **{name: f"lion_fast.{name}" for name in ("adapters", "backbones", "data", "errors", "methods")},
    **{name: f"lion_fast.{name}" for name in ("pruning", "training")},
    **{
        name: f"lion_fast.equilibrium.{name}"
        for name in ("contraction", "functional", "layer", "reference", "solvers")
    },
    "weights": "lion_fast.backbones.weights",
}

__all__ = ["__version__", *_WHERE, *_MODULES]


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
