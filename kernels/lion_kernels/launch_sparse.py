"""Launch configurations of the block-sparse products, as `launch` has those of the whole solve."""

import torch

from lion_kernels import launch, launch_step
from lion_kernels.launch_step import StepConfig

# Per arithmetic and block: rows, block (the columns of a tile), depth of a slice, warps, stages. Nothing here
# has been timed yet; they are tiles that compile without spills.
_PRODUCT = {
    "half": {16: (128, 16, 16, 4, 4), 32: (128, 32, 32, 4, 4), 64: (128, 64, 64, 8, 3)},
    "tf32": {16: (128, 16, 16, 4, 3), 32: (128, 32, 32, 8, 3), 64: (64, 64, 32, 8, 3)},
    "ieee": {16: (64, 16, 16, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
}
# A step holds more than a product: the old state too, which is float32 where a half-precision one is damped.
_STEP = {
    "half": _PRODUCT["half"],
    "damped": {16: (128, 16, 16, 4, 4), 32: (64, 32, 32, 8, 4), 64: (64, 64, 64, 8, 3)},
    "tf32": _PRODUCT["tf32"],
    "ieee": _PRODUCT["ieee"] | {64: (32, 64, 16, 8, 2)},
}
_SAMPLED = {
    "half": {16: (64, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (64, 64, 64, 4, 3)},
    "tf32": {16: (32, 16, 16, 4, 3), 32: (32, 32, 32, 4, 3), 64: (32, 64, 64, 8, 3)},
    "ieee": {16: (32, 16, 16, 4, 2), 32: (16, 32, 32, 4, 2), 64: (16, 64, 64, 8, 2)},
}
OPS = ("matmul", "step", "sampled")
CAPABILITIES = (80, 90, 100)


def config(op: str, block: int, dtype: torch.dtype, tf32: bool = False, damping: float = 1.0) -> StepConfig:
    """The tile of "matmul", "step" or "sampled" for blocks of `block`; the same on every capability.

    Of "sampled" block_t is the rows of a slice, and block_k is not used. ValueError for a dtype that the
    kernels do not take.
    """
    if dtype not in launch.DTYPES:
        raise ValueError(f"the kernels take float16, bfloat16 and float32 tokens, not {dtype}")
    kind = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    if op == "sampled":
        return StepConfig(*_SAMPLED[kind][block])
    if op == "step":
        return StepConfig(*_STEP["damped" if kind == "half" and damping != 1 else kind][block])
    return StepConfig(*_PRODUCT[kind][block])


def choose(op: str, block: int, dtype: torch.dtype, device: torch.device, damping: float = 1.0) -> StepConfig:
    """`config` under torch's present setting of tf32; `device` is part of the question only."""
    return config(op, block, dtype, launch.tf32_allowed(), damping)


def matmul_constants(
    config: StepConfig, shape: tuple[int, int], numerics: dict[str, str]
) -> dict[str, object]:
    """The compile-time arguments of the dense x sparse kernel."""
    return {
        "N": shape[0],
        "K": shape[1],
        "ROW_BLOCKS": -(-shape[0] // config.block_n),
        "BLOCK_T": config.block_t,
        "BLOCK": config.block_n,
        "BLOCK_K": config.block_k,
        "INPUT": numerics["INPUT"],
        "PRECISION": numerics["PRECISION"],
    }


def sampled_constants(
    config: StepConfig, shape: tuple[int, int], numerics: dict[str, str]
) -> dict[str, object]:
    """The compile-time arguments of the sampled dense x dense kernel."""
    return {
        "N": shape[0],
        "K": shape[1],
        "BLOCK_T": config.block_t,
        "BLOCK": config.block_n,
        "INPUT": numerics["INPUT"],
        "PRECISION": numerics["PRECISION"],
    }


def _ship(
    name: str, module: str, kernel: str, capability: int, types: dict, constants: dict, chosen: StepConfig
) -> launch.Shipped:
    return launch.Shipped(
        name=name,
        module=module,
        kernel=kernel,
        capability=capability,
        signature=types,
        constexprs=constants,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        divisible=tuple(n for n in types if n.endswith("_ptr")),
    )


# (kind, block, damping): the launches of a block-sparse solve that are compiled, as in `launch_step`.
_LOOP = ("step", "adjoint step")
_SHIPPED_STEPS = {
    ("bf16", 16, 1.0): _LOOP,
    ("bf16", 32, 1.0): _LOOP,
    ("bf16", 64, 1.0): (*_LOOP, "step first", "step last", "adjoint step first", "read-out"),
    ("bf16", 16, 0.5): _LOOP,
    ("bf16", 32, 0.5): _LOOP,
    ("bf16", 64, 0.5): _LOOP,
    ("tf32", 64, 1.0): _LOOP,
    ("ieee", 64, 1.0): _LOOP,
}
_KINDS = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "ieee": (torch.float32, False)}


def shipped() -> list[launch.Shipped]:
    """The products for a matrix of 768 x 768, and the block-sparse steps, for each capability."""
    found = []
    for capability in CAPABILITIES:
        for kind, (dtype, tf32) in _KINDS.items():
            for block in (16, 32, 64):
                found += _ship_products(kind, dtype, tf32, block, capability)
        for (kind, block, damping), labels in _SHIPPED_STEPS.items():
            dtype, tf32 = _KINDS[kind]
            chosen = config("step", block, dtype, tf32, damping)
            kernels = launch_step.sparse_kernels(chosen, 768, 768, dtype, tf32, damping)
            for label, kernel, types, constants in kernels:
                if label in labels:
                    name = f"sparse {label} sm_{capability} {kind} {block}{' damped' if damping != 1 else ''}"
                    found.append(
                        _ship(name, "lion_kernels.step", kernel, capability, types, constants, chosen)
                    )
    return found


def _ship_products(
    kind: str, dtype: torch.dtype, tf32: bool, block: int, capability: int
) -> list[launch.Shipped]:
    tokens, numerics = "*" + launch.DTYPES[dtype], launch.numerics(dtype, tf32)
    module, shape = "lion_kernels.sparse_kernels", (768, 768)
    chosen = config("matmul", block, dtype, tf32)
    types = {"x_ptr": tokens, "values_ptr": tokens, "starts_ptr": "*i32", "columns_ptr": "*i32"}
    types |= {"out_ptr": tokens, "T": "i32"}
    constants = matmul_constants(chosen, shape, numerics)
    name = f"sparse matmul sm_{capability} {kind} {block}"
    found = [_ship(name, module, "_sparse_matmul_kernel", capability, types, constants, chosen)]
    chosen = config("sampled", block, dtype, tf32)
    types = {"a_ptr": tokens, "b_ptr": tokens, "rows_ptr": "*i32", "columns_ptr": "*i32"}
    types |= {"partial_ptr": "*fp32", "T": "i32", "SPLIT": "i32"}
    constants = sampled_constants(chosen, shape, numerics)
    name = f"sparse sampled sm_{capability} {kind} {block}"
    return [*found, _ship(name, module, "_sampled_kernel", capability, types, constants, chosen)]
