"""Equilibrium layers: contraction, solvers with their implicit gradients, and the layers made of them.

Stands alone: needs torch and `lion_kernels`, and nothing else of `lion_fast` but its errors.

>>> import torch
>>> from lion_fast.equilibrium import LionLayer
>>> LionLayer(8, state_dim=4)(torch.randn(2, 5, 8)).shape
torch.Size([2, 5, 8])
"""

from lion_fast.equilibrium import reference
from lion_fast.equilibrium.contraction import bounded, contraction_scale, spectral_norm_bound
from lion_fast.equilibrium.functional import equilibrium
from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound
from lion_fast.equilibrium.reference import replace_layers
from lion_fast.equilibrium.solve import SolveInfo, SolveOptions
from lion_fast.equilibrium.solvers import ImplicitLayer, anderson, broyden, implicit, picard
from lion_fast.equilibrium.states import StateLayer

__all__ = [
    "ImplicitLayer",
    "LionLayer",
    "Masked",
    "PixelEnd",
    "SolveInfo",
    "SolveOptions",
    "StateLayer",
    "anderson",
    "bounded",
    "broyden",
    "contraction_scale",
    "conv_norm_bound",
    "equilibrium",
    "implicit",
    "picard",
    "reference",
    "replace_layers",
    "spectral_norm_bound",
]
