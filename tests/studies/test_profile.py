"""lion-fast profile: parts charged by a clock of the test's own, counts, the trace, files, errors."""

import csv
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import tiny_backbone, tiny_model, write_images

from lion_fast import create, load_backbone
from lion_fast.commands.main import main
from lion_fast.errors import OptionError
from lion_fast.studies import measuring, memory
from lion_fast.studies.profiling import measure, profile_model, report, snapshot
from lion_fast.studies.profiling.measure import clocked_step
from lion_fast.studies.profiling.parts import Clock
from lion_fast.studies.profiling.step import Step

TINY = ["vit_tiny_patch16_224", "--img-size", "32", "--backbone-set", "depth=2", "--batch-size", "2"]
QUICK = ["--steps", "2", "--warmup", "0"]


def images(n=3, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ticks(monkeypatch):
    """A clock that moves only where the test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(measuring.HostTimer, "read", lambda self: now.seconds)
    return now


class Tick(torch.autograd.Function):
    """Passes on what it gets, and takes time in the forward and in the backward."""

    @staticmethod
    def forward(ctx, x, now, forward, backward):
        ctx.now, ctx.backward_takes = now, backward
        now.seconds += forward
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.now.seconds += ctx.backward_takes
        return grad, None, None, None


def slow(module, now, forward, backward=0.0):
    """Make a module of a model take time."""
    usual = module.forward
    module.forward = lambda *args, **kwargs: _ticked(usual(*args, **kwargs), now, forward, backward)


def _ticked(out, now, forward, backward):
    first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
    first = Tick.apply(first, now, forward, backward)
    return first if rest is None else (first, *rest)


def train_step(model):
    return Step(model, images(), torch.zeros(3, dtype=torch.long), "train", "no", "adamw")


def one_step(model):
    return clocked_step(train_step(model), Clock(model, torch.device("cpu")))


def charged(model):
    """The places of a step that took time."""
    return {place: seconds for place, seconds in one_step(model).items() if seconds}


# -- time by part


def test_time_is_charged_to_the_part_that_takes_it(ticks, monkeypatch):
    """Delays of known length in every part, forward and backward, and nothing anywhere else."""
    model = tiny_model()
    slow(model.input_end, ticks, 1, 2)
    slow(model.backbone.blocks[0], ticks, 4, 8)
    slow(model.backbone.blocks[1].mlp.fc1, ticks, 16, 32)  # deep inside the same part
    slow(model.output_end, ticks, 64, 128)
    slow(model.head, ticks, 256, 512)
    usual = F.cross_entropy

    def slow_loss(*args, **kwargs):
        return Tick.apply(usual(*args, **kwargs), ticks, 1024, 2048)

    monkeypatch.setattr(F, "cross_entropy", slow_loss)
    step = torch.optim.AdamW.step

    def slow_step(self, *args, **kwargs):
        ticks.seconds += 4096
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    forward = {"input end": 1, "backbone": 4 + 16, "output end": 64, "head": 256, "loss": 1024}
    expected = {("optimiser", "optimiser"): 4096}
    for part, seconds in forward.items():
        expected |= {("forward", part): seconds, ("backward", part): 2 * seconds}
    assert charged(model) == expected
    assert sum(expected.values()) == ticks.seconds == 8191  # nothing is lost


def test_a_delay_of_a_method_shows_in_its_part_only(ticks):
    model = create(tiny_backbone(), "adaptformer", num_classes=3, rank=2)
    slow(model.adapters[0], ticks, 3, 5)
    assert charged(model) == {("forward", "method"): 3, ("backward", "method"): 5}


def test_what_lies_between_the_parts_is_other_and_hooking_no_part(ticks, monkeypatch):
    def then_wait(usual, seconds):
        def late(*args):
            found = usual(*args)
            ticks.seconds += seconds
            return found

        return late

    monkeypatch.setattr(Step, "loss", then_wait(Step.loss, 7))
    monkeypatch.setattr(Clock, "follow", then_wait(Clock.follow, 9))
    assert charged(tiny_model()) == {("other", "other"): 7}


def test_a_recomputed_block_is_the_backbones_in_the_backward(ticks):
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, memory="save")
    model = create(backbone, "lora", num_classes=3, rank=2)
    slow(model.backbone.blocks[1].norm2, ticks, 3, 5)
    assert charged(model) == {("forward", "backbone"): 3, ("backward", "backbone"): 3 + 5}


@pytest.mark.parametrize("method, calls, backwards", [("vpt", 2, 2), ("cvpt", 4, 3), ("lora", 2, 2)])
def test_a_frozen_attention_that_is_run_by_a_method_is_the_backbones(
    ticks, monkeypatch, method, calls, backwards
):
    """No module is called there, so the helpers have to say whose work it is; the embedding likewise.

    CVPT's first self-attention is in front of everything that is trained.
    """
    attention = F.scaled_dot_product_attention

    def slower(*args, **options):
        return Tick.apply(attention(*args, **options), ticks, 3, 5)

    monkeypatch.setattr(F, "scaled_dot_product_attention", slower)
    model = create(tiny_backbone(), method, num_classes=3)
    embed = model.backbone.model._pos_embed
    model.backbone.model._pos_embed = lambda x: _ticked(embed(x), ticks, 100, 0)
    assert charged(model) == {
        ("forward", "backbone"): 100 + 3 * calls, ("backward", "backbone"): 5 * backwards,
    }  # fmt: skip


def test_an_error_in_a_step_leaves_no_hook_behind():
    from torch.nn.modules import module as hooks

    model = tiny_model("vpt", length=2)
    model.head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one_step(model)
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def test_a_cnn_has_both_ends():
    model = create(
        load_backbone("resnet10t", pretrained=False), "lion", num_classes=3, form="residual", pixel_channels=2
    )
    found = one_step(model)
    for phase in ("forward", "backward"):
        assert {"input end", "backbone", "output end"} <= {part for p, part in found if p == phase}


# -- the whole


def test_a_profile_of_both_ends():
    model = tiny_model(tol=0.0, max_iter=5)
    before = [p.detach().clone() for p in model.trainable_parameters()]
    found = profile_model(model, images(), steps=3, warmup=0)
    json.dumps(found)
    assert list(found["modes"]) == ["train", "infer"]
    for end in ("input", "output"):
        told = found["ends"][end]
        assert told["iterations"] == told["max_iterations"] == 5 and told["converged"] == 0.0
        assert told["residual"] > 0 and 0 < told["certified"] <= told["gamma"] * (1 + 1e-4)
    train = found["modes"]["train"]
    assert train["diagnostics"]["input_iterations"] == 5
    assert len(train["steps"]) == 3
    for step in train["steps"]:
        assert sum(s for name, s in step.items() if name != "seconds") == pytest.approx(step["seconds"])
    shares = [spread["share"] for inside in train["parts"].values() for spread in inside.values()]
    assert sum(shares) == pytest.approx(1.0) and all(0 <= share <= 1 for share in shares)
    assert found["modes"]["infer"]["parts"].keys() == {"forward", "other"}
    assert train["resident_bytes"]["gradients"] == 4 * found["parameters"]["with_head"]
    assert "activation_bytes" not in found["modes"]["infer"]
    assert {"versions", "device_name", "threads", "git"} <= found.keys()
    assert found["weights_source"] == "random" and found["batch_size"] == 3
    # the model is given back as it was
    for p, value in zip(model.trainable_parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is None


def test_counts_are_the_same_every_time():
    def counts():
        found = profile_model(tiny_model(), images(), steps=1, warmup=0)
        told = found["modes"]["train"]
        return found["ends"], told["diagnostics"], told["activation_bytes"], told["resident_bytes"]

    first = counts()
    assert first == counts()
    assert all(first[2][owner] > 0 for owner in ("backbone", "method", "head"))


@pytest.mark.parametrize("method, options", [("lion", {"form": "states", "grid": 2}), ("probe", {})])
def test_what_fit_computes_once_is_also_measured_without_the_backbone(method, options):
    found = profile_model(tiny_model(method, **options), images(), modes=["train"], steps=1, warmup=0)
    assert list(found["modes"]) == ["train", "cached"]
    train, cached = found["modes"].values()
    assert {"backbone", "head", "loss"} <= train["parts"]["forward"].keys()
    assert "backbone" not in cached["parts"]["forward"].keys() | train["parts"]["backward"].keys()
    assert train["activation_bytes"]["backbone"] == cached["activation_bytes"]["backbone"] == 0
    assert ("output end" in cached["parts"]["backward"]) == (method == "lion")


def test_the_optimiser_and_half_precision():
    found = profile_model(tiny_model(), images(), modes=["train"], steps=1, warmup=0, optimizer="sgd")
    resident = found["modes"]["train"]["resident_bytes"]
    assert resident["optimiser"] == resident["gradients"]  # momentum alone
    half = profile_model(
        tiny_model("vpt", length=2), images(), modes=["train"], steps=1, warmup=0, mixed_precision="bf16"
    )
    assert half["mixed_precision"] == "bf16" and half["modes"]["train"]["activation_bytes"]["backbone"] > 0


def test_wrong_options_of_the_python_entry():
    for option in ({"modes": ["sleep"]}, {"steps": 0}, {"mixed_precision": "fp16"}, {"optimizer": "magic"}):
        with pytest.raises(OptionError, match=next(iter(option)).rstrip("s")):
            profile_model(tiny_model("probe"), images(), **option)
    with pytest.raises(OptionError, match="meta"):  # a device without a clock
        profile_model(nn.Linear(2, 2, device="meta"), images())


# -- the command


def trace_names(path):
    return {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}


def test_the_command_on_a_backbone(tmp_path, capsys):
    out = tmp_path / "profile"
    options = ["--set", "form=residual", "--set", "state_dim=8", "--classes", "3"]
    assert main(["profile", *TINY, *options, *QUICK, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p.name for p in out.iterdir()} == {
        "profile.json", "report.md", "time.png", "memory.png", "trace-train.json", "trace-infer.json",
    }  # fmt: skip
    assert json.loads((out / "profile.json").read_text()) == {k: v for k, v in found.items() if k != "out"}
    for name in ("time.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    names = trace_names(out / "trace-train.json")
    for part in ("input end", "backbone", "output end", "head", "loss"):
        assert {f"forward: {part}", f"backward: {part}"} <= names
    assert "optimiser" in names
    infer = trace_names(out / "trace-infer.json")
    assert "forward: backbone" in infer and not any(str(n).startswith("backward") for n in infer)
    operators = [row["name"] for row in found["modes"]["train"]["operators"]]
    assert operators and not names & {f"forward: {p}" for p in operators}
    text = (out / "report.md").read_text()
    train, end = found["modes"]["train"], found["ends"]["input"]
    for number in (
        f"{1e3 * train['seconds']:.2f}",
        f"{1e3 * train['parts']['backward']['backbone']['seconds']:.2f}",
        f"| {train['activation_bytes']['backbone'] / 2**20:.2f} |",
        f"| {end['iterations']:.2f} | {end['max_iterations']:.0f} |",
        f"{found['parameters']['with_head']:,}",
    ):
        assert number in text
    assert "random" in text and "2 random-normal images" in text and "(time.png)" in text


def test_the_command_on_a_run(tmp_path, capsys):
    data, run, out = write_images(tmp_path / "photos", each=6), tmp_path / "run", tmp_path / "profile"
    model = ["--backbone", TINY[0], "--no-pretrained", *TINY[1:5]]
    options = ["--set", "state_dim=8", "--set", "grid=2", "--preset", "none", "--epochs", "1"]
    options += ["--optimizer", "sgd", "--batch-size", "8", "--device", "cpu", "--no-progress"]
    assert main(["finetune", str(data), *model, *options, "--out", str(run)]) == 0
    capsys.readouterr()
    given = ["--images", str(data), "--batch-size", "4", *QUICK, "--out", str(out)]
    assert main(["profile", str(run), *given]) == 0
    told = capsys.readouterr().out
    assert "output end: iterations" in told and "cached:" in told and str(out) in told
    found = json.loads((out / "profile.json").read_text())
    assert found["optimizer"] == "sgd" and found["num_classes"] == 3 and found["images"] == "4 given images"
    assert found["options"]["state_dim"] == 8 and list(found["modes"]) == ["train", "cached", "infer"]
    some = sorted((data / "class0").iterdir())[:2]
    given = ["--images", *map(str, some), "--batch-size", "5", "--mode", "infer", *QUICK, "--out", str(out)]
    assert main(["profile", str(run / "adapter"), *given]) == 0
    found = json.loads((out / "profile.json").read_text())
    assert found["images"] == "2 given images, repeated to 5" and found["batch_size"] == 5
    assert list(found["modes"]) == ["infer"]
    # what the adapter says itself
    assert main(["profile", str(run), "--method", "vpt", "--out", str(out)]) == 2
    assert "leave out --method" in capsys.readouterr().err
    with open(run / "steps.csv", newline="") as file:
        assert list(csv.DictReader(file))  # the run's own files stay


def test_the_command_on_another_method(tmp_path):
    assert main(["profile", *TINY, "--method", "vpt", *QUICK, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["method"] == "vpt" and found["ends"] == {}
    assert "## Equilibria" not in (tmp_path / "report.md").read_text()


def test_wrong_command_lines(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    for argv, code, words in (
        ([*TINY, "--method", "magic"], 2, "magic"),
        (["vit_of_nobody"], 1, "vit_of_nobody"),
        (["runs/nothing"], 1, "runs/nothing"),
        ([str(tmp_path / "empty")], 1, "adapter.json"),
        ([*TINY[:-2], "--batch-size", "0"], 2, "--batch-size"),
        ([*TINY, "--steps", "0"], 2, "--steps"),
        ([*TINY, "--device", "nowhere"], 2, "nowhere"),
        ([*TINY, "--set", "state_dims=3"], 2, "state_dims"),
        ([*TINY, "--images", str(tmp_path / "none.png")], 1, "none.png"),
    ):
        assert main(["profile", *argv, *out]) == code, argv
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
    assert main(["profile", *TINY, "--out", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_an_interruption_leaves_what_is_known(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_trace", stop)
    options = ["--set", "form=residual", *QUICK, "--out", str(tmp_path)]
    assert main(["profile", *TINY, *options]) == 130
    assert f"what was measured is in {tmp_path}" in capsys.readouterr().err
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["interrupted"] and found["modes"]["train"]["seconds"] > 0 and "infer" not in found["modes"]
    assert "Interrupted" in (tmp_path / "report.md").read_text() and (tmp_path / "time.png").exists()


# -- what a GPU does, with stand-ins


class FakeEvent:
    """An event on a device whose clock is a count of events."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def elapsed_time(self, other):
        return float(other.at - self.at)  # ms


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as a profile needs it: the allocator's record, and what it was asked for."""
    events = [("alloc", 100), ("alloc", 50), ("free_requested", 50), ("free_completed", 50)]
    trace = [
        {"action": action, "size": size, "addr": 512 * i, "time_us": 10 * i, "frames": [], "stream": 0}
        for i, (action, size) in enumerate(events)
    ]
    found = SimpleNamespace(trace=trace, waits=0, recording=[])

    def synchronize(*args):
        found.waits += 1

    def record(enabled="all", **options):
        found.recording.append(enabled)

    for owner, name, stand_in in (
        (torch.cuda, "Event", FakeEvent),
        (torch.cuda, "synchronize", synchronize),
        (torch.cuda, "memory_allocated", lambda *args: 1000),
        (torch.cuda, "max_memory_allocated", lambda *args: 3 * 2**20 + 1000),
        (torch.cuda, "reset_peak_memory_stats", lambda *args: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda.memory, "_record_memory_history", record),
        (torch.cuda.memory, "_snapshot", lambda: {"segments": [], "device_traces": [trace]}),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    return found


def test_the_clock_of_a_cuda_device(cuda):
    model = tiny_model()
    step, first = train_step(model), FakeEvent.count
    found = clocked_step(step, Clock(model, torch.device("cuda")))
    # a millisecond from each event to the next, but for the one between the hooks and the backward
    assert sum(found.values()) == pytest.approx(1e-3 * (FakeEvent.count - first - 2))
    assert cuda.waits == 1  # at the end


def test_the_snapshot_of_a_cuda_step(tmp_path, cuda):
    ran = []
    step = SimpleNamespace(kind="train", device=torch.device("cuda:0"))
    step.run = lambda: ran.append(cuda.recording[-1])
    names = snapshot.take(step, tmp_path)
    assert cuda.recording == ["all", None] and ran == ["all"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names.values())
    assert pickle.loads((tmp_path / names["pickle"]).read_bytes())["device_traces"] == [cuda.trace]
    assert "<script" in (tmp_path / names["html"]).read_text()
    assert (tmp_path / names["plot"]).read_bytes().startswith(b"\x89PNG")
    assert snapshot.level_over_time(cuda.trace, 1000) == [(0.0, 1100), (1e-05, 1150), (3e-05, 1100)]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_everything_about_a_cuda_step_by_stand_ins(tmp_path, cuda):
    """The way through all of a device's measurements and into the report; the numbers are the stand-ins'."""
    model = tiny_model()
    found = profile_model(model, images(), modes=["train"], steps=1, warmup=0)
    step = train_step(model)
    step.device = torch.device("cuda")
    told = {}
    measure._measure(step, told, tmp_path, 2, 0, lambda text: None)
    assert told["peak_bytes"] == 3 * 2**20 and "allocator" in told["peak_measured"]
    assert told["allocator_bytes"] == dict.fromkeys((*memory.OWNERS, "unkept"), 0)
    assert len(told["steps"]) == 2 and told["parts"]["backward"]["backbone"]["seconds"] > 0
    report.write(found | {"device": "cuda", "modes": {"train": told}}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for words in ("| 3.00 |", "by the allocator: unkept", "device ms", *told["snapshot"].values()):
        assert words in text
    assert set(told["snapshot"].values()) <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.gpu
def test_a_profile_on_a_gpu(tmp_path):
    model = tiny_model().cuda()
    found = profile_model(model, images(), steps=3, out=tmp_path)
    train = found["modes"]["train"]
    for step in train["steps"]:
        assert sum(s for name, s in step.items() if name != "seconds") == pytest.approx(step["seconds"])
    assert train["peak_bytes"] > 0 and train["allocator_bytes"]["backbone"] > 0
    assert any(row["device_seconds"] > 0 for row in train["operators"])
    for name in train["snapshot"].values():
        assert (tmp_path / name).stat().st_size > 0
    assert {"forward: backbone", "backward: backbone"} <= trace_names(tmp_path / "trace-train.json")
