"""The operators of the equilibrium layer: Triton kernels on a GPU, plain torch elsewhere."""
