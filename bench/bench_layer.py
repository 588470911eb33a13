"""Speed of one equilibrium layer on this machine, as ratios: `make bench`.

Contenders on the same tokens and weights: the formula as an eager loop (`equilibrium.reference`, free:
R wide, injection inside; tied: D wide), the layer (R wide, injection hoisted, plain torch on a CPU and
Triton on a GPU) and the layer compiled. Their outputs are compared before anything is timed. "easy"
is a random recurrence (about 5 applications), "hard" one that contracts by its bound (about 26).
"""

import pytest
import torch

from lion_fast import LionLayer, reference

B, N, D, R = 4, 197, 384, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS = {"easy": 0.2, "hard": 0.9}


def layer(cls, problem, recurrence):
    torch.manual_seed(0)
    made = cls(D, R, recurrence=recurrence, gamma=0.9, tol=1e-3, device=DEVICE)
    with torch.no_grad():
        made.V.copy_(torch.randn(D, R) / D**0.5)
        if recurrence == "tied":
            made.A.copy_(PROBLEMS[problem] * torch.linalg.pinv(made.V))
        else:
            made.W.copy_(PROBLEMS[problem] * torch.eye(R))
            made.A.copy_(torch.randn(R, D) / D**0.5)
        made.b.fill_(1.0)
    return made


def contender(name, problem):
    recurrence = "tied" if name.endswith("tied") else "free"
    if name.startswith("reference"):
        return layer(reference.LionLayer, problem, recurrence)
    made = layer(LionLayer, problem, recurrence)
    return torch.compile(made) if name.startswith("compiled") else made


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(1)
    return torch.randn(B, N, D, device=DEVICE), torch.randn(B, N, D, device=DEVICE)


NAMES = ("reference", "layer", "compiled", "reference-tied", "layer-tied")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_layer(benchmark, tokens, problem, mode, name):
    x, upstream = tokens
    model = contender(name, problem)
    with torch.no_grad():
        expected = layer(reference.LionLayer, problem, "tied" if name.endswith("tied") else "free")(x)
        assert (model(x) - expected).norm() <= 2e-2 * (expected - x).norm()
        _, info = layer(LionLayer, problem, "free")(x, return_info=True)
    benchmark.extra_info |= {"device": DEVICE, "torch": torch.__version__, "shape": [B, N, D, R]}
    benchmark.extra_info["iterations"] = info.summary()["iterations"]
    benchmark.group = f"{problem}, {mode}, {'tied' if name.endswith('tied') else 'free'}"

    def forward():
        with torch.no_grad():
            model(x)
        finish()

    def both():
        model(x).backward(upstream)
        finish()

    def finish():
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(forward if mode == "forward" else both, warmup_rounds=2, rounds=10)
