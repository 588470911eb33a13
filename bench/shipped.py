"""The configurations that `aot.py` compiles ahead of time: every tile of the tables of `lion_kernels`."""

from dataclasses import dataclass

import torch

from lion_kernels import launch, launch_sparse, launch_step
from lion_kernels.reference import ADJOINT_FLOOR, STATE_FLOOR

STATES = (16, 32, 64, 128, 256)
WIDTH = 768
TRITON_TYPES = {dtype: f"*{name}" for dtype, name in launch.DTYPES.items()}
# By name: dtype, and whether float32 products are made in tf32.
ARITHMETICS = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "ieee": (torch.float32, False)}
# (operation, capability, padded state, arithmetic): the Triton releases in which some activation has spills
# on every tile tried, of which this is one without in the others. Without tensor cores.
SPILLING = {("solve", 100, 128, "ieee"): ("3.6",)}


@dataclass(frozen=True)
class Shipped:
    """One kernel configuration as it is compiled ahead of time.

    `signature` holds Triton's type of every argument that is not a constexpr, `capability` the target, such
    as 90. `spills_in` names the releases of Triton, such as "3.6", in which the compiled kernel may use a
    stack; in others it must not.
    """

    name: str
    module: str
    kernel: str
    capability: int
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    spills_in: tuple[str, ...] = ()

    @property
    def divisible(self) -> tuple[str, ...]:
        """The arguments that are multiples of 16: rows may start at odd addresses, arrays never do."""
        return tuple(name for name in self.signature if name.endswith("_ptr"))


def shipped() -> list[Shipped]:
    """Every configuration for every capability of the tables; W, b and c are float32."""
    return [*_whole(), *_steps(), *_sparse()]


def _whole() -> list[Shipped]:
    """The whole-solve kernels with the cheapest and the dearest activation.

    All activations are listed at a state of 64, an odd state and width once.
    """
    cheap = {"activation": "relu", "damping": 1.0}
    dear = {"activation": "gelu", "damping": 0.5}
    found = []
    for capability in launch.CONFIGS:
        tiles = [
            (state, *arithmetic)
            for arithmetic in ARITHMETICS.values()
            for state in STATES
            if launch.why_not(arithmetic[0], state) is None
        ]
        for op in ("solve", "adjoint"):
            found += [_loop(op, capability, *tile, **options) for tile in tiles for options in (cheap, dear)]
            for activation in ("tanh", "gelu_tanh", "silu"):
                found.append(_loop(op, capability, 64, torch.bfloat16, activation=activation, damping=1.0))
            found.append(_loop(op, capability, 64, torch.float16, **cheap))
            found.append(_loop(op, capability, 48, torch.bfloat16, width=100, **cheap))
        found += [_weights(capability, *tile) for tile in tiles]
        pointers = ("partial_ptr", "da_ptr", "dv_ptr", "dc_ptr", "dw_ptr", "db_ptr")
        signature = dict.fromkeys(pointers, "*fp32") | {"splits": "i32"}
        constants = {"D": WIDTH, "R": 64, "BLOCK": launch.SUM_BLOCK}
        sums = ("_sum_splits_kernel", capability, signature, constants)
        found.append(Shipped(f"sum sm_{capability}", "lion_kernels.adjoint", *sums, 4, 1))
    return found


def _arithmetic_name(dtype: torch.dtype, kinds: dict[str, str]) -> str:
    return launch.DTYPES[dtype] + (f"-{kinds['PRECISION']}" if dtype == torch.float32 else "")


def _loop(
    op: str,
    capability: int,
    state: int,
    dtype: torch.dtype,
    tf32: bool = False,
    *,
    width: int = WIDTH,
    activation: str,
    damping: float,
) -> Shipped:
    """The solve or the adjoint."""
    chosen = launch.config(op, 1 << 16, width, state, dtype, divmod(capability, 10), tf32)
    kinds, tokens, word = launch.numerics(dtype, tf32), TRITON_TYPES[dtype], "*fp32"
    if op == "solve":
        own = {"SAVE": True, "CARRY": chosen.carry, "floor": STATE_FLOOR}
        pointers = dict.fromkeys(("x_ptr", "a_ptr", "v_ptr", "out_ptr", "p_ptr"), tokens)
        pointers |= dict.fromkeys(("w_ptr", "b_ptr", "c_ptr", "change_ptr"), word)
    else:
        own = {"ONES": launch.ONES, "floor": ADJOINT_FLOOR}
        names = ("grad_ptr", "p_ptr", "a_ptr", "v_ptr", "dx_ptr", "t_ptr", "z_ptr")
        pointers = dict.fromkeys(names, tokens) | {"w_ptr": word, "change_ptr": word}
    steps, kernel = {"solve": ("max_iter", "_solve_fwd_kernel"), "adjoint": ("terms", "_adjoint_kernel")}[op]
    detail = [f"R{state}", _arithmetic_name(dtype, kinds), activation]
    detail += ["damped"] * (damping != 1) + [f"D{width}"] * (width != WIDTH)
    pointers |= {"count_ptr": "*i32", "T": "i32", "tol": "fp32", "damping": "fp32", steps: "i32"}
    constants = launch.loop_constants(chosen, width, state, kinds, activation, damping, RESIDUAL=True, **own)
    asked = (op, capability, launch.padded_state(state), launch.arithmetic(dtype, tf32))
    return Shipped(
        " ".join([op, f"sm_{capability}", *detail]), f"lion_kernels.{op}", kernel, capability, pointers,
        constants, **chosen.resources, spills_in=SPILLING.get(asked, ()),
    )  # fmt: skip


def _weights(capability: int, state: int, dtype: torch.dtype, tf32: bool) -> Shipped:
    """The fused weight gradients."""
    chosen = launch.config("weights", 1 << 16, WIDTH, state, dtype, divmod(capability, 10), tf32)
    kinds = launch.numerics(dtype, tf32)
    pointers = dict.fromkeys(("grad_ptr", "x_ptr", "t_ptr", "z_ptr"), TRITON_TYPES[dtype])
    pointers |= {"partial_ptr": "*fp32", "T": "i32"}
    constants = launch.weights_constants(chosen, WIDTH, state, kinds, rows=512)
    return Shipped(
        f"weights sm_{capability} R{state} {_arithmetic_name(dtype, kinds)}", "lion_kernels.adjoint",
        "_weight_grads_kernel", capability, pointers, constants, **chosen.resources,
    )  # fmt: skip


# (arithmetic, state, damping): the step launches that are compiled. The activation is gelu, whose code is the
# longest; what is left out differs from what is here by less than these differ among themselves.
_EVERY = ("step first", "step", "step last", "adjoint step first", "adjoint step")
_STEPS = {
    ("bf16", 512, 1.0): (*_EVERY, "step finish", "adjoint finish", "read-out"),
    ("bf16", 512, 0.5): ("step", "adjoint step"),
    ("bf16", 1024, 1.0): ("step", "step last", "adjoint step"),
    ("tf32", 512, 1.0): ("step", "adjoint step", "read-out"),
    ("ieee", 512, 1.0): ("step", "adjoint step"),
}
# (arithmetic, block, damping): the same for steps that read block-sparse matrices.
_LOOP = ("step", "adjoint step")
_SPARSE_STEPS = {
    ("bf16", 16, 1.0): _LOOP,
    ("bf16", 32, 1.0): _LOOP,
    ("bf16", 64, 1.0): (*_LOOP, "step first", "step last", "adjoint step first", "read-out"),
    ("bf16", 16, 0.5): _LOOP,
    ("bf16", 32, 0.5): _LOOP,
    ("bf16", 64, 0.5): _LOOP,
    ("tf32", 64, 1.0): _LOOP,
    ("ieee", 64, 1.0): _LOOP,
}


def _launches(
    config: launch_step.StepConfig, state: int, arithmetic: str, damping: float, sparse: bool = False
) -> dict[str, tuple[str, dict[str, str], dict[str, object]]]:
    """By label: kernel, signature and constants of every launch of a wide solve and its adjoint."""
    dtype, tf32 = ARITHMETICS[arithmetic]
    tokens, kinds = TRITON_TYPES[dtype], launch.numerics(dtype, tf32)
    planes = launch_step.plane_dtypes(dtype, damping, 0.0)
    held, operand = TRITON_TYPES[planes.state], TRITON_TYPES[planes.operand]
    split = planes.state != planes.operand
    records = {"T": "i32", "k": "i32", "part_ptr": "*fp32", "change_ptr": "*fp32", "count_ptr": "*i32"}
    lists = {"starts_ptr": "*i32", "columns_ptr": "*i32"}
    loop = {"tol": "fp32", "damping": "fp32", "done_ptr": "*i32", **records, **lists}
    forward = {"x_ptr": tokens, "b_ptr": "*fp32", "q_ptr": "*fp32", "z_ptr": held, **loop}
    forward |= {"u_ptr": operand, "p_ptr": tokens, "h_ptr": tokens}
    backward = {"grad_ptr": tokens, "scale_ptr": "*fp32", "p_ptr": tokens, "g_ptr": "*fp32", **loop}
    backward |= {"y_ptr": held, "u_ptr": operand}
    finish = {"z_ptr": held, "p_ptr": tokens, "h_ptr": tokens, **records}
    end = {"p_ptr": tokens, "scale_ptr": "*fp32", "u_ptr": operand, "t_ptr": tokens, "h_ptr": tokens}
    end |= {"done_ptr": "*i32", **records}
    read_out = {"h_ptr": tokens, "weight_ptr": tokens, "c_ptr": "*fp32", "x_ptr": tokens, "out_ptr": tokens}
    read_out |= lists | {"change_ptr": "*fp32", "T": "i32"}
    found = {}
    for label, first, last in ((" first", True, False), ("", False, False), (" last", False, True)):
        weight = {"weight_ptr": tokens if first else operand}
        given = (config, WIDTH, state, kinds, "gelu", damping)
        own = {"FIRST": first, "SPARSE": sparse}
        constants = launch_step.step_constants(*given, STATE_FLOOR, SAVE=True, LAST=last, SPLIT=split, **own)
        found[f"step{label}"] = "step_fwd_kernel", forward | weight, constants
        if not last:
            constants = launch_step.step_constants(*given, ADJOINT_FLOOR, CHECK=not first, **own)
            found[f"adjoint step{label}"] = "step_bwd_kernel", backward | weight, constants
    constants = launch_step.finish_constants(config, state, kinds, "gelu", STATE_FLOOR, SAVE=True)
    found["step finish"] = "step_finish_kernel", finish, constants
    constants = launch_step.finish_constants(config, state, kinds, "gelu", ADJOINT_FLOOR, STEPS=True)
    found["adjoint finish"] = "step_bwd_finish_kernel", end, constants
    constants = launch_step.read_out_constants(
        config, WIDTH, state, kinds, BIAS=True, RESIDUAL=True, SPARSE=sparse
    )
    found["read-out"] = "read_out_kernel", read_out, constants
    return found


def _step(name: str, capability: int, chosen: launch_step.StepConfig, launched: tuple) -> Shipped:
    kernel, signature, constants = launched
    return Shipped(
        name, "lion_kernels.step_kernels", kernel, capability, signature, constants, **chosen.resources
    )


def _steps() -> list[Shipped]:
    found = []
    for capability in launch_step.CONFIGS:
        for (arithmetic, state, damping), labels in _STEPS.items():
            dtype, tf32 = ARITHMETICS[arithmetic]
            chosen = launch_step.config(1, WIDTH, state, dtype, divmod(capability, 10), tf32, damping)
            launches = _launches(chosen, state, arithmetic, damping)
            for label in labels:
                name = f"{label} {arithmetic} R={state}{' damped' if damping != 1 else ''}"
                found.append(_step(name, capability, chosen, launches[label]))
    return found


def _sparse() -> list[Shipped]:
    """The products for a matrix of 768 x 768, and the block-sparse steps."""
    found = []
    for capability in launch.CONFIGS:
        for arithmetic in ARITHMETICS:
            for block in (16, 32, 64):
                found += _products(capability, arithmetic, block)
        for (arithmetic, block, damping), labels in _SPARSE_STEPS.items():
            chosen = launch_sparse.config("step", block, *ARITHMETICS[arithmetic], damping)
            launches = _launches(chosen, WIDTH, arithmetic, damping, sparse=True)
            for label in labels:
                how = f"{arithmetic} {block}{' damped' if damping != 1 else ''}"
                name = f"sparse {label} sm_{capability} {how}"
                found.append(_step(name, capability, chosen, launches[label]))
    return found


def _products(capability: int, arithmetic: str, block: int) -> list[Shipped]:
    dtype, tf32 = ARITHMETICS[arithmetic]
    tokens, kinds = TRITON_TYPES[dtype], launch.numerics(dtype, tf32)
    signatures = {
        "matmul": {"x_ptr": tokens, "values_ptr": tokens, "starts_ptr": "*i32", "columns_ptr": "*i32"},
        "sampled": {"a_ptr": tokens, "b_ptr": tokens, "rows_ptr": "*i32", "columns_ptr": "*i32"},
    }
    signatures["matmul"] |= {"out_ptr": tokens, "T": "i32"}
    signatures["sampled"] |= {"partial_ptr": "*fp32", "T": "i32", "SPLIT": "i32"}
    constants = {"matmul": launch_sparse.matmul_constants, "sampled": launch_sparse.sampled_constants}
    kernels = {"matmul": "_sparse_matmul_kernel", "sampled": "_sampled_kernel"}
    found = []
    for op, signature in signatures.items():
        chosen = launch_sparse.config(op, block, dtype, tf32)
        found.append(
            Shipped(
                f"sparse {op} sm_{capability} {arithmetic} {block}", "lion_kernels.sparse_kernels",
                kernels[op], capability, signature, constants[op](chosen, (WIDTH, WIDTH), kinds),
                **chosen.resources,
            )
        )  # fmt: skip
    return found
