"""Launch configurations and tuned results; no kernel runs here."""

import json
import subprocess
import sys

import pytest
import torch

from lion_kernels import launch, present, tune, tuned

HALF, FLOAT = torch.bfloat16, torch.float32
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize(
    "op, state, dtype, capability, expected",
    [
        ("solve", 32, HALF, (9, 0), launch.Config(64, 64, 4, 3)),
        ("solve", 32, HALF, (10, 0), launch.Config(64, 32, 4, 3)),
        ("solve", 128, torch.float16, (8, 0), launch.Config(64, 64, 8, 3)),
        ("solve", 200, HALF, (9, 0), launch.Config(32, 32, 16, 2, carry=True)),
        ("adjoint", 64, FLOAT, (9, 0), launch.Config(32, 32, 16, 2)),
    ],
)
def test_config_is_read_off_the_table(op, state, dtype, capability, expected):
    assert launch.config(op, 1000, 768, state, dtype, capability) == expected


@pytest.mark.parametrize("capability, table", [((7, 5), 80), ((8, 9), 80), ((9, 0), 90), ((12, 0), 100)])
def test_other_chips_take_the_newest_older_table(capability, table):
    for state in (16, 256):
        found, expected = (
            launch.config("solve", 1, 768, state, HALF, c) for c in (capability, divmod(table, 10))
        )
        assert found == expected


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("op", ["solve", "adjoint", "weights"])
def test_every_state_has_a_tile_that_fits(op, capability, tf32):
    for dtype in launch.DTYPES:
        for state in range(1, 257):
            if launch.why_not(dtype, state) is None:
                found = launch.config(op, 1000, 768, state, dtype, capability, tf32)
                for size in (found.block_t, found.block_d, found.num_warps):
                    assert size & (size - 1) == 0
                assert found.block_t >= 16 and found.block_d >= 16
                if op != "weights":
                    W = launch.padded_state(state) ** 2 * (4 if dtype == FLOAT else 2)
                    assert W < SHARED_BYTES[capability[0] * 10]


def test_the_batch_does_not_choose_the_tile():
    """Else a row's bits would depend on the batch it came in."""
    for op in ("solve", "adjoint"):
        found = {launch.config(op, rows, 768, 64, HALF, (9, 0)) for rows in (1, 197, 12608, 1 << 20)}
        assert len(found) == 1


def test_padded_state():
    padded = {1: 16, 16: 16, 17: 32, 48: 64, 64: 64, 65: 128, 200: 256}
    assert {state: launch.padded_state(state) for state in padded} == padded


def test_why_not():
    assert launch.why_not(HALF, 256) is launch.why_not(FLOAT, 128) is None
    assert "not torch.float64" in launch.why_not(torch.float64, 16)
    for dtype, state, widest in ((HALF, 257, 256), (FLOAT, 129, 128)):
        reason = launch.why_not(dtype, state)
        assert f"up to {widest}" in reason and "lion_kernels.step" in reason
        with pytest.raises(ValueError, match="does not stay on chip"):
            launch.config("solve", 1, 8, state, dtype, (9, 0))


def test_numerics():
    assert launch.numerics(HALF, True) == {
        "MATH": "ptx", "INPUT": "bf16", "LOOP": "fp16", "PRECISION": "ieee"
    }  # fmt: skip
    assert launch.numerics(FLOAT, True)["PRECISION"] == "tf32"
    assert launch.numerics(FLOAT, False) == {
        "MATH": "exact", "INPUT": "fp32", "LOOP": "fp32", "PRECISION": "ieee"
    }  # fmt: skip
    # The interpreter has no PTX and multiplies the bit patterns of bfloat16.
    assert launch.numerics(HALF, True, interpreted=True)["INPUT"] == "fp32"
    assert launch.numerics(torch.float16, True, interpreted=True)["MATH"] == "approx"


@pytest.mark.parametrize("precision, allowed", [("highest", False), ("high", True), ("medium", True)])
def test_tf32_follows_torch(precision, allowed):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert present.tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_per_split():
    assert launch.rows_per_split(launch.FUSED_ROWS + 1, 768) == 0
    for rows in (0, 1, 64, 197, 1576, launch.FUSED_ROWS):
        split = launch.rows_per_split(rows, 768)
        assert 64 <= split <= 512 and split & (split - 1) == 0


def test_importing_asks_no_device_and_no_triton():
    code = (
        "import sys, torch; import lion_kernels.ops, lion_kernels.tune;"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tuned_results_are_kept_per_device(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path))
    file = tuned.path("NVIDIA H200")
    assert file == tmp_path / "tuned-nvidia-h200.json" and tuned.read(file) == {}
    first, second = launch.Config(128, 64, 8, 4), launch.Config(32, 64, 4, 3, carry=True)
    tuned.write(file, {"solve D768 R64 bf16": first}, "NVIDIA H200")
    tuned.write(file, {"adjoint D768 R64 bf16": second}, "NVIDIA H200")
    assert tuned.read(file) == {"solve D768 R64 bf16": first, "adjoint D768 R64 bf16": second}
    assert json.loads(file.read_text())["device"] == "NVIDIA H200"
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    assert tuned.choose("solve", 1, 768, 50, HALF, cuda) == first
    assert tuned.choose("solve", 1, 384, 50, HALF, cuda) == launch.config("solve", 1, 384, 50, HALF, (9, 0))


def test_a_broken_file_of_tuned_results_names_itself(tmp_path):
    for n, text in enumerate(("{", "[]", '{"configs": {"solve": {"block_t": 1, "speed": 2}}}')):
        file = tmp_path / f"tuned-{n}.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=file.name):
            tuned.read(file)


@pytest.mark.parametrize("state, dtype", [(16, HALF), (64, HALF), (128, HALF), (64, FLOAT)])
def test_candidates_begin_with_the_table_and_fit(state, dtype):
    found = tune.candidates("solve", 768, state, dtype, (9, 0))
    assert found[0] == launch.config("solve", 1, 768, state, dtype, (9, 0))
    assert len(found) == len(set(found)) > 5
