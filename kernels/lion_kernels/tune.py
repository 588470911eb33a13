"""Opt-in timing of tiles on a device; what is fastest there is kept for `tuned.choose`."""

from itertools import product

import torch

from lion_kernels import launch, present, tuned

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def candidates(
    op: str, width: int, state: int, dtype: torch.dtype, capability: tuple[int, int]
) -> list[launch.Config]:
    """The table's configuration first, then tiles around it that can fit the chip."""
    first = launch.config(op, 1, width, state, dtype, capability, present.tf32_allowed())
    found = [first]
    padded, size = launch.padded_state(state), 4 if dtype == torch.float32 else 2
    limit = launch.newest(SHARED_BYTES, capability)
    for block_t, block_d, warps, stages in product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        shared = stages * (block_t + padded) * block_d * size + padded * padded * size
        per_thread = 3 * block_t * padded / (32 * warps)
        if shared <= limit and per_thread <= 200:
            found.append(launch.Config(block_t, block_d, warps, stages, carry=first.carry))
    return list(dict.fromkeys(found))


def autotune(
    width: int,
    state: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 50432,
    activation: str = "relu",
    device: str | torch.device = "cuda",
) -> dict[str, launch.Config]:
    """Times solve and adjoint over their candidates on a device and stores the fastest of each.

    The problem is random with a recurrence of norm 0.8. A candidate that does not compile or launch is
    left out. Returns the stored entries. Takes minutes, most of them compilation. Needs a CUDA device.

        from lion_kernels import tune
        tune.autotune(768, 64)
    """
    from triton.testing import do_bench

    from lion_kernels import adjoint, solve

    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, grad_out = draw(rows, width).to(dtype), draw(rows, width).to(dtype)
    A, V, b, c = draw(state, width) / width**0.5, draw(width, state) / state**0.5, draw(state), draw(width)
    W = draw(state, state)
    W *= 0.8 / torch.linalg.matrix_norm(W, 2)
    options = (activation, 50, 1e-3, 1.0, True)
    p = solve.solve(x, A, W, b, V, c, *options)[1]

    def run_solve(config: launch.Config):
        return solve.solve(x, A, W, b, V, c, *options, config=config)

    def run_adjoint(config: launch.Config):
        return adjoint.adjoint(grad_out, x, p, A, W, V, activation, 8, 0.0, 1.0, True, config=config)

    entries = {}
    for op, run in (("solve", run_solve), ("adjoint", run_adjoint)):
        times = {}
        for config in candidates(op, width, state, dtype, present.capability(device)):
            try:
                times[config] = do_bench(lambda: run(config), return_mode="median")  # noqa: B023
            except Exception as error:
                print(f"{op} {config}: left out ({type(error).__name__})")
        entries[tuned.key(op, width, state, dtype, present.tf32_allowed())] = min(times, key=times.get)
    name = torch.cuda.get_device_name(device)
    tuned.write(tuned.path(name), entries, name)
    return entries
