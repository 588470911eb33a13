"""The grids of the cost study: a small plan for any machine, two for a GPU (first, full), one's own."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import timm
import torch

from lion_fast.backbones import OWN_WEIGHTS, family_of, load_backbone
from lion_fast.backbones.cheaper import MEMORY
from lion_fast.errors import OptionError, check_choice
from lion_fast.methods import available, method_options
from lion_fast.studies.cost.models import forms_of
from lion_fast.studies.cost.setting import Contender, Setting

LENGTHS = (10, 50, 100, 200)
VIT_B, VIT_L = "vit_base_patch16_224", "vit_large_patch16_224"
MODES, DTYPES, ENGINES = ("infer", "train"), ("fp32", "bf16", "fp8"), ("eager", "compile", "graphs")
# Models of one compiled run: their graphs' memory stays taken
AT_ONCE = 6

Plan = list[tuple[Setting, list[Contender]]]


@functools.cache
def family(backbone: str) -> str:
    """Family of a backbone by name; built without memory for its weights."""
    if not timm.is_model(OWN_WEIGHTS.get(backbone, backbone)):
        return load_backbone(backbone, pretrained=False).family  # an error in our own words
    from accelerate import init_empty_weights

    with init_empty_weights():
        return family_of(timm.create_model(OWN_WEIGHTS.get(backbone, backbone), num_classes=0))


def contenders(
    backbone: str, mode: str, *, lengths: Sequence[int] = (10,), methods: Iterable[str] | None = None
) -> list[Contender]:
    """Every method on a backbone, at its defaults, in every form; prompt methods at every length given."""
    known = available()
    chosen = list(known) if methods is None else list(methods)
    for method in chosen:
        check_choice("method", method, known)
    found, kind = [], family(backbone)
    for method in chosen:
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
    # 8 bits pay where their rounding is fused, so both dtypes are compiled: LION's default and the floor
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
    for backbone, mode in itertools.product(backbones, modes):
        found = contenders(backbone, mode, lengths=lengths, methods=methods)
        for batch, *how in itertools.product(batch_sizes, dtypes, engines, memory):
            plan.append((Setting(backbone, mode, batch, *how, img_size=img_size), found))
    return plan


def _present(*methods: str) -> tuple[str, ...]:
    return tuple(m for m in methods if m in available())


def _without_shallow(found: Iterable[Contender]) -> list[Contender]:
    return [c for c in found if dict(c.options).get("depth") is None]


PLANS: dict[str, Callable[[], Plan]] = {"small": small, "first": first, "full": full}


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
