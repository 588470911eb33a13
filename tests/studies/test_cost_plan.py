"""The plans: what is measured, in which order."""

import dataclasses

from lion_fast.methods import available
from lion_fast.studies.cost import plan

TINY = "vit_tiny_patch16_224"


def test_the_plans_name_what_exists():
    small, full = plan.small(), plan.full()
    for some in (small, plan.first(), full):
        for setting, wanted in some:
            kind = plan.family(setting.backbone)
            assert wanted and all(kind in available()[c.method].families for c in wanted), setting.key()
            assert len({c.label() for c in wanted}) == len(wanted)
    measured_on = {setting.backbone for setting, _ in full}
    assert {f"vit_{s}_patch16_224" for s in ("tiny", "small", "base", "large")} <= measured_on
    assert {"swin_base_patch4_window7_224", "resnet50"} <= measured_on
    everything = {c for setting, wanted in full for c in wanted}
    assert {c.method for c in everything} == set(available())
    assert {dict(c.options).get("length") for c in everything if c.method == "vpt"} >= set(plan.LENGTHS)
    assert {s.engine for s, _ in full} == set(plan.ENGINES) and {s.dtype for s, _ in full} == set(plan.DTYPES)
    assert {s.mode for s, _ in full} == set(plan.MODES) and {s.memory for s, _ in full} == {"plain", "save"}
    assert {c.method for _, wanted in small for c in wanted} == set(available())


def test_the_first_plan_is_vit_b_end_to_end_in_small_settings():
    found = plan.first()
    assert {(s.backbone, s.batch_size) for s, _ in found} == {(plan.VIT_B, 64)}
    assert all(len(wanted) <= 6 for _, wanted in found)
    order = [(s.mode, s.dtype, s.engine, s.memory) for s, _ in found]
    eager = ("bf16", "eager", "plain")
    assert order[:5] == [
        *[(mode, *eager) for mode in ("train", "infer")] * 2,
        ("train", "bf16", "eager", "save"),
    ]
    labels = {"lion:states", "lion:residual", "probe"}
    labels |= {f"vpt(length={n}):{form}" for n in (10, 50, 200) for form in ("exact", "naive")}
    for mode in plan.MODES:
        plain = [
            c.label()
            for s, some in found
            if (s.mode, s.dtype, s.engine, s.memory) == (mode, *eager)
            for c in some
        ]
        assert len(plain) == len(labels) and set(plain) == labels
    # fp8 and its neighbour in bf16 differ by the dtype alone
    (other, a), (fp8, b) = found[5:]
    assert fp8.dtype == "fp8" and dataclasses.replace(fp8, dtype="bf16") == other
    assert [c.label() for c in a] == [c.label() for c in b] == ["lion:states"]


def test_every_form_is_a_contender():
    found = {c.label() for c in plan.contenders(TINY, "infer", lengths=(10, 50))}
    some = {"lion:residual", "lion:states", "probe", "lora", "lora:merged", "vpt(depth=shallow,length=10)"}
    assert some | {"vpt(length=10):exact", "vpt(length=50):naive"} <= found
    assert "lora:merged" not in {c.label() for c in plan.contenders(TINY, "train")}
