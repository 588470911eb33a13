"""A setting measured: times against known delays, what a row says, what is refused a time, and the report."""

import json
from types import SimpleNamespace

import pytest
import torch

from lion_fast.backbones import load_backbone
from lion_fast.studies import measuring
from lion_fast.studies.cost import check, measure, models, plan, plots, report, timing
from lion_fast.studies.cost.compare import compare
from lion_fast.studies.cost.setting import FLOOR, Contender, Setting
from lion_fast.studies.measuring import distance, quantiles

TINY = "vit_tiny_patch16_224"
SETTING = Setting(TINY, "train", 2, img_size=32)
INFER = Setting(TINY, "infer", 1, img_size=32)
BOTH = [Contender("vpt", (("length", 2),), form) for form in ("exact", "naive")]


@pytest.fixture(scope="module")
def measured():
    """One small training and one inference run, shared by the tests that look at rows."""
    torch.manual_seed(0)
    some = [
        Contender("lion", form="residual"),
        *(Contender("vpt", (("length", 3),), form) for form in ("exact", "naive")),
    ]
    train = measure.measure(SETTING, [*some, Contender("probe")], rounds=3)
    return train + measure.measure(Setting(TINY, "infer", 2, img_size=32), some, rounds=3)


def row_of(found, label, mode="train"):
    return next(row for row in found if row["label"] == label and row["mode"] == mode)


def test_turns_are_interleaved_and_ratios_are_of_one_round(monkeypatch):
    """A machine that slows down by and by must not show in ratios: twice the floor, all drifting."""
    order, clock = [], [0.0]

    class Fake:
        device = torch.device("cpu")

        def __init__(self, name, cost):
            self.name, self.cost = name, cost

        def run(self):
            order.append(self.name)
            clock[0] += self.cost * (1 + 0.1 * len(order))

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    a, b = Contender("a"), Contender("b")
    steps = {FLOOR: Fake("floor", 1.0), a: Fake("a", 2.0), b: Fake("b", 3.0)}
    times, floors = timing.take_turns(steps, 6, lambda i: None, pytest.fail)
    timed = order[6:]  # after two runs each to warm up
    assert timed[:8] == ["floor", "a", "b", "floor", "floor", "b", "a", "floor"] and len(timed) == 24
    for contender, ratio in ((a, 2.0), (b, 3.0)):
        told = timing.summary(times[contender], floors[contender], 4)
        for name in ("ratio", "ratio_q20", "ratio_q80"):
            assert told[name] == pytest.approx(ratio, rel=1e-12)
    told = timing.summary(times[a], floors[a], 4)
    assert told["seconds_q80"] > 1.4 * told["seconds_q20"]  # the drift shows in the times
    assert told["images_per_second"] == 4 / told["seconds"] and told["rounds"] == 6
    assert len(times[FLOOR]) == 6 and floors[FLOOR] == times[FLOOR]


def test_quantiles_and_distance():
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    values = [float(v) for v in range(11)]
    assert quantiles(values[::-1]) == (5.0, 2.0, 8.0)
    # what is not finite is within no bound
    assert not distance(torch.tensor([float("nan")]), torch.ones(1)) <= check.FORMS_AGREE


def test_a_longer_step_is_timed_longer(monkeypatch):
    """The whole way from a model to a row: a known delay in one contender shows in its time and ratio.

    By a clock of the test's own, a millisecond a look: a busy machine is as good as a quiet one.
    """
    build, now = models.build, [0.0]

    def look():
        now[0] += 0.001
        return now[0]

    def delay():
        now[0] += 0.25

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=look))

    def slow(backbone, contender):
        model = build(backbone, contender)
        if contender.form == "naive":
            features = model.features
            model.features = lambda x: (delay(), features(x))[1]
        return model

    monkeypatch.setattr(models, "build", slow)
    _, exact, naive = measure.measure(INFER, BOTH, rounds=3)
    assert naive["status"] == exact["status"] == "ok"
    assert exact["seconds"] == pytest.approx(0.001) and naive["seconds"] == pytest.approx(0.251)
    assert naive["images_per_second"] == pytest.approx(1 / 0.251)
    # each ratio is of its own round's floor
    assert exact["ratio"] == pytest.approx(1) and naive["ratio"] == pytest.approx(251)


def test_a_row_says_everything(measured):
    row = row_of(measured, "lion:residual")
    assert row["status"] == "ok" and row["held_in"] == "fp32" and row["seed"] == 0
    assert row["weights_source"] == "random" and len(row["weights_sha256"]) == 64
    assert {"torch", "timm", "lion_fast", "python"} <= row["versions"].keys() and row["device_name"]
    assert "git" in row and "git_changed" in row and row["threads"] == torch.get_num_threads()
    assert row["img_size"] == 32 and row["interpolation"] and len(row["mean"]) == 3
    for name in ("seconds", "seconds_q20", "seconds_q80", "ratio", "images_per_second", "floor_seconds"):
        assert row[name] > 0
    assert row["seconds_q20"] <= row["seconds"] <= row["seconds_q80"] and row["rounds"] == 3
    assert row["build_seconds"] > 0 and row["first_step_seconds"] > 0 and row["peak_bytes"] >= 0
    assert row["diagnostics"]["input_iterations"] >= 1
    D, R, K = 192, 32, models.NUM_CLASSES
    assert row["parameters"] == 2 * (2 * D * R + R * R + R + D)
    assert row["parameters_with_head"] == row["parameters"] + K * (D + 1)
    assert row["adapter_bytes"] > 4 * row["parameters_with_head"]
    json.dumps(row)


def test_the_two_forms_of_lion():
    """States keep nothing in the backbone and run no backward through it: by hand, against the floor."""
    assert models.forms_of("lion") == ["states", "residual"]
    both = plan.contenders(TINY, "train", methods=("lion",))
    assert [c.label() for c in both] == ["lion:states", "lion:residual"]
    found = measure.measure(SETTING, both, rounds=1)
    states, residual = row_of(found, "lion:states"), row_of(found, "lion:residual")
    assert [row["status"] for row in found] == ["ok"] * 3
    D, R, K = 192, 32, models.NUM_CLASSES
    assert states["parameters"] == R * D + R * R + R
    assert states["parameters_with_head"] == states["parameters"] + K * (D + 16 * R + 1)
    assert states["activation_bytes"]["backbone"] == 0 < residual["activation_bytes"]["backbone"]
    assert {name.split("_")[0] for name in states["diagnostics"]} == {"output"}
    assert states["macs_per_image"] < residual["macs_per_image"]
    # rows from before there was a choice are residual, and nothing new has their key
    assert plots._name({"method": "lion", "form": ""}) == "lion, residual" == plots._name(residual)
    assert plots._name(states) == "lion, states" and plots._name(found[0]) == "floor"
    old = {**residual, "key": residual["key"].removesuffix(":residual"), "label": "lion", "form": ""}
    worse, remarks = compare([old], [states, residual])
    assert worse == [] and remarks[-1].endswith("/lion: not in the new rows") and len(remarks) == 3


def test_floors_and_training(measured):
    floor = row_of(measured, "floor")
    assert measured[0] is floor and floor["ratio"] == floor["ratio_q80"] == 1.0
    assert "parameters" not in floor and floor["resident_bytes"]["optimiser"] == 0
    # rows in, a backward to them: as much kept as by LION inside the backbone, but for its first norm's input
    lion = row_of(measured, "lion:residual")
    block_input = 4 * 2 * 5 * 192
    assert lion["activation_bytes"]["backbone"] - floor["activation_bytes"]["backbone"] == block_input
    assert row_of(measured, "probe")["activation_bytes"]["backbone"] == 0
    # training: forward, and the gradient to the input beside; the probe has no such backward
    infer = row_of(measured, "floor", "infer")["macs_per_image"]
    assert row_of(measured, "probe")["macs_per_image"] == infer + 2 * 192 * models.NUM_CLASSES
    patches = 4 * 3 * 16**2 * 192
    assert 2 * (infer - patches) <= floor["macs_per_image"] <= 2.2 * (infer - patches)


def test_forms_that_differ_are_not_timed(monkeypatch):
    build = models.build
    merged = measure.measure(INFER, [Contender("lora", form="merged")], rounds=1)[1]
    assert merged["checked"].startswith("merged = unmerged to ") and "adapter_bytes" not in merged

    def wrong(backbone, contender):
        model = build(backbone, contender)
        if contender.form == "naive":
            model.prompts.data[0, 0, 0] += 1.0  # one entry of one prompt
        if contender.form == "merged":
            model.head.weight.data[0, 0] += 1.0
        return model

    monkeypatch.setattr(models, "build", wrong)
    found = measure.measure(INFER, [*BOTH, Contender("lora", form="merged")], rounds=1)
    assert [row["status"] for row in found] == ["ok", "failed", "failed", "failed"]
    for row in found[1:]:
        assert row["reason"].startswith("Wrong:") and "differ" in row["reason"]
        assert "seconds" not in row and "ratio" not in row


@pytest.mark.parametrize("dtype, save", [("bf16", "plain"), ("bf16", "save"), ("fp32", "save")])
def test_other_precisions_and_memory(dtype, save):
    setting = Setting(TINY, "train", 2, dtype, memory=save, img_size=32)
    found = measure.measure(setting, [Contender("lion", form="residual"), Contender("full")], rounds=1)
    assert [row["status"] for row in found] == ["ok"] * 3, [row["reason"] for row in found]
    assert {row["memory"] for row in found} == {save}
    # a method that trains the weights holds them whole
    assert [row["held_in"] for row in found[1:]] == [dtype, "fp32"]


def test_rounded_outputs_are_compared_with_float32():
    setting = Setting(TINY, "infer", 8, "bf16", img_size=32)
    floor, lion = measure.measure(setting, [Contender("lion", form="residual")], rounds=1)
    for row in (floor, lion):
        told = row["against_fp32"]
        # bfloat16 rounds to 2^-9; a dozen blocks of it, never nothing
        assert 1e-4 < told["relative"] < 3e-2 and told["sqnr_db"] > 30 and told["cosine"] > 0.999
        assert 0.5 <= told["same_class"] <= 1
    text = report.markdown([floor, lion])
    assert f"`lion:residual` {lion['against_fp32']['relative']:.2e}" in text


def test_compiled_models_are_checked_against_eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, mode=None: net)
    setting = Setting(TINY, "infer", 1, engine="compile", img_size=32)
    found = measure.measure(setting, [Contender("probe")], rounds=1)
    assert [row["checked"] for row in found] == ["compiled = eager to 0.0e+00"] * 2
    monkeypatch.setattr(torch, "compile", lambda net, mode=None: lambda x: net(x) * 1.01)
    (floor,) = measure.measure(setting, [Contender("probe")], rounds=1)  # no floor, no ratios
    assert floor["status"] == "failed" and "compiled and eager outputs differ by 1.0e-02" in floor["reason"]


def test_compiled_training_is_checked_by_its_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, mode=None: net)
    setting = Setting(TINY, "train", 1, engine="compile", img_size=32)
    floor, probe, dyt = measure.measure(setting, [Contender("probe"), Contender("dyt")], rounds=1)
    assert floor["checked"] == "compiled = eager to 0.0e+00"
    assert probe["checked"] == "compiled = eager to 0.0e+00, gradients to 0.0e+00"
    assert "not compared" in dyt["checked"]

    def other_gradients(net, mode=None):
        return lambda x: 1.1 * net(x) - 0.1 * net(x).detach()

    monkeypatch.setattr(torch, "compile", other_gradients)
    _, probe = measure.measure(setting, [Contender("probe")], rounds=1)
    assert probe["status"] == "failed" and "gradients differ" in probe["reason"]


def test_a_floor_that_breaks_while_it_is_timed_leaves_no_ratios(monkeypatch):
    calls, timed = [], timing.timed

    def fail(step, repeats):
        calls.append(step.contender)
        if calls.count(FLOOR) == 4:
            raise RuntimeError("out of paper")
        return timed(step, repeats)

    monkeypatch.setattr(timing, "timed", fail)
    floor, probe = measure.measure(INFER, [Contender("probe")], rounds=2)
    assert floor["status"] == probe["status"] == "failed" and "ratio" not in probe
    assert floor["reason"] == "RuntimeError: out of paper" and floor["reason"] in probe["reason"]


@pytest.mark.parametrize("where, name", [(models, "build"), (timing, "timed")])
def test_a_lost_device_ends_the_setting(monkeypatch, where, name):
    """A stand-in for a sticky CUDA error. What was ready, but not timed, is no row."""
    real = getattr(where, name)

    def fail(first, second, *rest):
        contender = first.contender if name == "timed" else second
        if contender.form == "naive":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(first, second, *rest)

    monkeypatch.setattr(where, name, fail)
    monkeypatch.setattr(check, "forms", lambda contender, backbones: "not here")
    some = [Contender("probe"), Contender("vpt", (("depth", "magic"),)), *BOTH[::-1]]
    with pytest.raises(measure.DeviceLost) as lost:
        measure.measure(INFER, some, rounds=1)
    assert lost.value.key.endswith("/vpt(length=2):naive")
    told = {row["label"]: row["status"] for row in lost.value.rows if row["reason"]}
    assert told == {"vpt(depth=magic)": "skipped", "vpt(length=2):naive": "failed"}


def test_a_model_is_moved_off_its_zeros():
    backbone = load_backbone(TINY, pretrained=False, img_size=32, depth=1)
    model = models.build(backbone, Contender("lion", form="residual"))
    assert all(p.any() for p in model.trainable_parameters())
    again = models.build(backbone, Contender("lion", form="residual"))
    for p, q in zip(model.trainable_parameters(), again.trainable_parameters(), strict=True):
        assert torch.equal(p, q)


def timed(key, seconds, ratio=1.0, spread=0.02, **more):
    row = {"key": key, "status": "ok", "method": "lion", "device_name": "a", "threads": 1}
    for name, value in (("seconds", seconds), ("ratio", ratio)):
        row |= {name: value, f"{name}_q20": value * (1 - spread), f"{name}_q80": value * (1 + spread)}
    return row | more


@pytest.mark.parametrize(
    "seconds, more, threshold, expected",
    [
        (1.05, {}, 0.1, []),  # within the threshold
        (1.2, {}, 0.1, ["k: seconds 1 -> 1.2 (+20.0%)"]),
        (1.2, {}, 0.3, []),
        (1.2, {"spread": 0.3}, 0.1, []),  # within the spread
        (0.5, {}, 0.1, []),
        # elsewhere times say nothing, ratios do
        (9.0, {"device_name": "b"}, 0.1, []),
        (0.1, {"ratio": 1.5, "device_name": "b"}, 0.1, ["k: ratio 1 -> 1.5 (+50.0%)"]),
        (1.0, {"activation_bytes": {"method": 1009}}, 9, []),
        (1.0, {"activation_bytes": {"method": 1011}}, 9, ["k: activations of method 1,000 -> 1,011 (+1.1%)"]),
        (1.0, {"macs_per_image": 102}, 0.1, ["k: macs_per_image 100 -> 102 (+2.0%)"]),
    ],
)
def test_comparing_rows(seconds, more, threshold, expected):
    old = [timed("k", 1.0, activation_bytes={"method": 1000}, macs_per_image=100)]
    assert compare(old, [timed("k", seconds, **more)], threshold)[0] == expected


def test_comparing_rows_that_are_better_new_or_broken():
    old = [timed("k", 1.0)]
    assert compare(old, [timed("k", 0.5)])[1] == ["k: seconds 1 -> 0.5 (-50.0%), better"]
    assert compare(old, [timed("n", 1.0)])[1] == ["n: new", "k: not in the new rows"]
    broken = {"key": "k", "status": "failed", "reason": "it broke"}
    assert compare(old, [broken])[0] == ["k: was measured, now failed: it broke"]


def test_the_report(measured):
    text = report.markdown(measured, ["throughput-x.png"])
    assert "vpt(length=3):naive" in text and "![throughput x](throughput-x.png)" in text
    assert "weights random, sha256 " + row_of(measured, "lion:residual")["weights_sha256"][:12] in text
    assert "`vpt(length=3):exact` exact = naive to" in text and "`lion:residual` input" in text
    cells = next(line for line in text.splitlines() if line.startswith("| `lion:residual` |")).split(" | ")
    assert cells[1] == f"{row_of(measured, 'lion:residual')['ratio']:.3f}" and len(cells) == 11
    bad = {**row_of(measured, "probe"), "status": "failed", "reason": "out of paper"}
    assert "- failed: `probe`: out of paper" in report.markdown([*measured, bad])


def test_the_report_says_what_an_option_of_the_backbone_changes(measured):
    plain = row_of(measured, "lion:residual")
    save = {**plain, "setting": plain["setting"] + "/save", "seconds": 1.5 * plain["seconds"]}
    save["activation_bytes"] = {k: v / 2 for k, v in plain["activation_bytes"].items()}
    text = report.markdown([plain, save])
    assert f'| memory="save" | {save["setting"]} | `lion:residual` | 1.500 | 0.500 | 1.000 |' in text


def test_plots_are_drawn(tmp_path, measured):
    longer = [
        {**row, "options": {"length": 9}, "label": row["label"].replace("3", "9"), "key": row["key"] + "9"}
        for row in measured
        if row["method"] == "vpt"
    ]
    drawn = plots.draw_all([*measured, *longer], tmp_path)
    slug = SETTING.key().replace("/", "-").replace("@", "-")
    assert {f"{kind}-{slug}.png" for kind in ("throughput", "lengths", "breakdown")} <= set(drawn)
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert plots.draw_all(measured[:1], tmp_path) == []
