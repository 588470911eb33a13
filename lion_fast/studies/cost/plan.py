"""What is measured: a small plan for any machine, two for a GPU (first, full), and running one."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch

from lion_fast.backbones import OWN_WEIGHTS, family_of, load_backbone
from lion_fast.errors import OptionError, check_choice
from lion_fast.methods import available, method_options
from lion_fast.studies.cost.measure import DeviceLost, forms_of, keys, measure
from lion_fast.studies.cost.rows import Contender, Setting, Store
from lion_fast.studies.environment import context

LENGTHS = (10, 50, 100, 200)
VIT_B, VIT_L = "vit_base_patch16_224", "vit_large_patch16_224"
MODES, DTYPES, ENGINES = ("infer", "train"), ("fp32", "bf16", "fp8"), ("eager", "compile", "graphs")
# Models of one compiled run: their graphs' memory stays taken
AT_ONCE = 6
# A contender that lost the device so often is left alone
MOST_LOSSES = 2

Plan = list[tuple[Setting, list[Contender]]]


@functools.cache
def family(backbone: str) -> str:
    """Family of a backbone by name; built without memory for its weights."""
    if not timm.is_model(OWN_WEIGHTS.get(backbone, backbone)):
        return load_backbone(backbone, pretrained=False).family  # an error in our own words
    with torch.device("meta"):
        return family_of(timm.create_model(OWN_WEIGHTS.get(backbone, backbone), num_classes=0))


def contenders(
    backbone: str, mode: str, *, lengths: Sequence[int] = (10,), methods: Iterable[str] | None = None
) -> list[Contender]:
    """Every method on a backbone, at its defaults, in every form; prompt methods at every length given."""
    known = available()
    chosen = list(known) if methods is None else list(methods)
    for method in chosen:
        check_choice("method", method, known)
    found = []
    for method in chosen:
        kind = family(backbone)
        if kind not in known[method].families:
            continue
        forms = [form for form in forms_of(method) if form != "merged" or mode == "infer"]
        options: list[tuple] = [()]
        if "length" in method_options(known[method]) and kind == "vit":
            options = [(("length", length),) for length in lengths]
        if method == "vpt" and kind == "cnn":  # a border of pixels: one form
            forms = [""]
        for chosen_options in options:
            found += [Contender(method, chosen_options, form) for form in forms]
        if method == "vpt" and kind == "vit":
            found.append(Contender("vpt", (("depth", "shallow"), *options[0]), ""))
    # methods beside their rivals, LION first
    return sorted(found, key=lambda c: (c.method != "lion", chosen.index(c.method)))


def small() -> Plan:
    """Minutes on two cores: every method on a ViT-Ti, prompt lengths, saved memory; a Swin-T, a ResNet-18."""
    vit = "vit_tiny_patch16_224"
    plan: Plan = []
    for mode in ("train", "infer"):
        more = contenders(vit, mode, lengths=LENGTHS[1:], methods=("vpt",))
        plan.append((Setting(vit, mode, 4), contenders(vit, mode) + _without_shallow(more)))
    lean = _without_shallow(contenders(vit, "train", methods=_present("lion", "vpt", "lora", "full")))
    lean = [c for c in lean if c.form not in ("naive", "merged")]
    plan.append((Setting(vit, "train", 4, memory="save"), lean))
    for other in ("swin_tiny_patch4_window7_224", "resnet18"):
        some = _present("lion", "probe", "vpt", "ssf", "full")
        plan += [
            (Setting(other, mode, 2), contenders(other, mode, methods=some)) for mode in ("train", "infer")
        ]
    return plan


def first() -> Plan:
    """For a GPU's first minutes: ViT-B at batch 64 in bfloat16, LION beside VPT-deep and the probe.

    What matters most comes first, and a setting is small: a stop loses at most one. By estimate, as nothing
    of it has run on a GPU: 10 s to begin; in each of the five eager settings 4 s for two backbones, 1.5 s to
    build and check a contender, and 7 rounds of 0.1 s for each contender and each run of the floor, 15 to
    20 s in all; 20 to 25 s for each of the two compiled ones. Together two and a half minutes.
    """
    # none of them merges, so training and inference have the same contenders
    near = _without_shallow(contenders(VIT_B, "train", methods=("lion", "vpt", "probe")))
    far = _without_shallow(contenders(VIT_B, "train", lengths=(50, 200), methods=("vpt",)))
    plan: Plan = [
        (Setting(VIT_B, mode, 64, "bf16"), some) for some in (near, far) for mode in ("train", "infer")
    ]
    # a probe keeps nothing that could be saved
    exact = [c for c in (*near, *far) if c.form != "naive" and c.method != "probe"]
    plan.append((Setting(VIT_B, "train", 64, "bf16", memory="save"), exact))
    # 8 bits pay where their rounding is fused, so both dtypes are compiled: LION's default form and the floor
    plan += [(Setting(VIT_B, "infer", 64, dtype, "compile"), near[:1]) for dtype in ("bf16", "fp8")]
    return plan


def full() -> Plan:
    """For a GPU, what matters most first: it goes on where it stopped when time ran out."""
    rivals = _present("lion", "vpt", "probe", "lora", "full")
    plan: Plan = []

    def add(backbone: str, mode: str, batch: int, lengths=(10,), methods=None, **setting) -> None:
        found = contenders(backbone, mode, lengths=lengths, methods=methods)
        if methods is not None:
            found = _without_shallow(found)
        one = Setting(backbone, mode, batch, **{"dtype": "bf16", **setting})
        size = len(found) if one.engine == "eager" else AT_ONCE
        plan.extend((one, found[i : i + size]) for i in range(0, len(found), size))

    for mode in MODES:
        add(VIT_B, mode, 64, LENGTHS)
    add(VIT_B, "train", 64, methods=_present("lion", "vpt", "probe", "lora", "ssf", "full"), memory="save")
    for mode in MODES:
        add(VIT_B, mode, 64, methods=_present("lion", "vpt"), fold=True)
        add(VIT_B, mode, 64, methods=_present("lion", "vpt"), engine="compile", dtype="fp8")
        add(VIT_B, mode, 64, engine="compile")
    for batch in (1, 16, 256):
        for mode in MODES:
            add(VIT_B, mode, batch, methods=rivals)
    for mode in MODES:
        add(VIT_B, mode, 64, engine="graphs")
        add(VIT_B, mode, 64, methods=rivals, dtype="fp32")
    for backbone in (VIT_L, "vit_small_patch16_224", "vit_tiny_patch16_224"):
        for mode in MODES:
            add(backbone, mode, 64, LENGTHS)
    for mode in MODES:
        add(VIT_L, mode, 64, methods=_present("lion", "vpt"), engine="compile")
        add(VIT_L, mode, 64, methods=_present("lion", "vpt"), engine="compile", dtype="fp8")
    others = ("swin_base_patch4_window7_224", "resnet50")
    for backbone in others:
        for mode in MODES:
            add(backbone, mode, 64)
    for backbone in (*others, VIT_L, "vit_small_patch16_224", "vit_tiny_patch16_224"):
        for engine in ("graphs", "compile"):
            for mode in MODES:
                add(backbone, mode, 64, engine=engine)
    return plan


def custom(
    backbones: Sequence[str],
    *,
    modes: Sequence[str] = MODES,
    batch_sizes: Sequence[int] = (8,),
    dtypes: Sequence[str] = ("fp32",),
    engines: Sequence[str] = ("eager",),
    memory: Sequence[str] = ("plain",),
    lengths: Sequence[int] = (10,),
    methods: Sequence[str] | None = None,
    img_size: int | None = None,
) -> Plan:
    """Every combination of what is given; `OptionError` on a value that does not exist."""
    from lion_fast.backbones.cheaper import MEMORY

    for name, given, valid in (
        ("mode", modes, MODES),
        ("dtype", dtypes, DTYPES),
        ("engine", engines, ENGINES),
        ("memory", memory, MEMORY),
    ):
        for value in given:
            check_choice(name, value, valid)
    for name, given in (("batch size", batch_sizes), ("prompt length", lengths)):
        if not given or any(value < 1 for value in given):
            raise OptionError(f"every {name} must be at least 1; got {list(given)}")
    plan: Plan = []
    for backbone in backbones:
        for mode in modes:
            found = contenders(backbone, mode, lengths=lengths, methods=methods)
            for batch in batch_sizes:
                for dtype in dtypes:
                    for engine in engines:
                        for how in memory:
                            setting = Setting(backbone, mode, batch, dtype, engine, how, img_size=img_size)
                            plan.append((setting, found))
    return plan


def _present(*methods: str) -> tuple[str, ...]:
    return tuple(m for m in methods if m in available())


def _without_shallow(found: Iterable[Contender]) -> list[Contender]:
    return [c for c in found if dict(c.options).get("depth") is None]


PLANS: dict[str, Callable[[], Plan]] = {"small": small, "first": first, "full": full}


def run(
    plan: Plan,
    store: Store,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    minutes: float | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure what the store does not hold yet, writing after every setting.

    A row counts as held if it was taken with the same versions, device, threads and revision of the code and
    did not fail; `again` measures all. Where a row is missing, the setting's other missing contenders are
    timed beside it with a floor of the same minutes. `minutes`: begin no setting after that.

    Where a contender loses the device (`DeviceLost`), rows are written and this returns, as nothing more can
    run in this process. In the next one that contender comes last, by itself, and after a second loss not
    any more: whoever calls again as long as something is lost comes to an end.

    Returns counts: "settings", "measured", "held", "left" (settings not begun), and "lost": the key of the
    contender that lost the device, or None.
    """
    device = torch.device(device)
    where = context(device)
    ends = time.monotonic() + 60 * minutes if minutes is not None else None
    told: dict[str, Any] = {"settings": len(plan), "measured": 0, "held": 0, "left": 0, "lost": None}
    todo, last = [], []
    for setting, wanted in plan:
        floor, *others = keys(setting, wanted)
        missing = []
        for contender, key in zip(wanted, others, strict=True):
            losses = 0 if again else max(_losses(store, k, where) for k in (floor, key))
            if not again and (store.has(key, where) or losses >= MOST_LOSSES):
                told["held"] += 1
            elif losses:
                last.append((setting, [contender]))
            else:
                missing.append(contender)
        if missing:
            todo.append((setting, missing))
    todo += last
    for i, (setting, missing) in enumerate(todo):
        if ends is not None and time.monotonic() >= ends:
            told["left"] += 1
            continue
        try:
            rows = measure(
                setting,
                missing,
                device=device,
                rounds=rounds,
                where=where,
                say=lambda text, i=i: say(f"[{i + 1}/{len(todo)}] {text}"),
            )
        except DeviceLost as error:
            rows = error.rows
            lost = next(row for row in rows if row["key"] == error.key)
            lost["losses"] = 1 + _losses(store, error.key, where)
            told |= {"lost": error.key, "left": len(todo) - i}
        # an earlier floor stays beside the rows that were divided by it: each row has its own floor's time
        store.add(rows)
        told["measured"] += len(rows)
        if told["lost"]:
            break
    return told


def _losses(store: Store, key: str, where: Mapping[str, Any]) -> int:
    """How often this contender has lost the device since it last did not."""
    row = store.get(key, where)
    return row.get("losses", 0) if row is not None else 0


def describe(plan: Plan) -> list[str]:
    """One line per setting.

    >>> describe([(Setting("resnet18", "infer", 2), [Contender("lion")])])
    ['resnet18/infer/b2/fp32/eager: lion']
    """
    return [f"{setting.key()}: {', '.join(c.label() for c in wanted)}" for setting, wanted in plan]


def check_device(plan: Plan, device: torch.device) -> None:
    """`OptionError` if the plan needs what the device cannot do: CUDA graphs and fp8 need a GPU."""
    for setting, _ in plan if device.type != "cuda" else ():
        if setting.engine == "graphs" or setting.dtype == "fp8":
            raise OptionError(f"{setting.key()} needs a CUDA device; this is {device.type}")
