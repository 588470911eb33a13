"""Equilibrium layers: contraction, solvers with their implicit gradients, and the layers made of them."""
