"""The measuring itself: contenders of one setting, checked, then timed in turns beside their floor."""

import contextlib
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import Backbone, fp8, load_backbone
from lion_fast.backbones import cheaper as frozen
from lion_fast.errors import BackboneError, LionError, OptionError
from lion_fast.methods import TunedModel, available, create, method_options
from lion_fast.methods.lion import FORMS as LION_FORMS
from lion_fast.options import sides
from lion_fast.studies.cost.flops import counted_macs
from lion_fast.studies.cost.memory import cuda_activations, resident_bytes, saved_bytes
from lion_fast.studies.cost.rows import FLOOR, Contender, Setting
from lion_fast.studies.environment import context
from lion_fast.training.memory import PeakMemory

NUM_CLASSES = 100
SEED = 0
# Small, so that no weight goes anywhere while it is timed: iterations depend on weights.
LEARNING_RATE = 1e-6
# The largest relative distance between two forms of one function, in float32.
FORMS_AGREE = 1e-4
# ... and between the compiled and the eager model, by dtype
COMPILED_AGREES = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 1e-1}
COMPILED_GRADIENTS_AGREE = {"fp32": 1e-3, "bf16": 1e-1, "fp8": 2e-1}
# Timed at once in a round, at least; on a GPU a step may take a millisecond
ROUND_SECONDS = {"cpu": 0.0, "cuda": 0.1}
# Contenders between two runs of the floor
FLOOR_EVERY = 2


class Wrong(LionError, RuntimeError):
    """Contenders that should agree do not: a time of theirs would be a time of something else."""


class DeviceLost(LionError, RuntimeError):
    """The device itself failed: nothing works on it any more in this process, but in a new one.

    `rows`: what is known of the setting, the failed row of `key` included.
    """

    def __init__(self, key: str, rows: list[dict]):
        super().__init__(f"the device failed in {key}")
        self.key, self.rows = key, rows


class _FloorBroke(Exception):
    """The floor broke while contenders were timed beside it."""


def is_lost(error: BaseException) -> bool:
    """Whether an error is one of the CUDA device, which every later call of the process repeats.

    >>> is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    True
    >>> is_lost(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    False
    """
    told = str(error)
    own = isinstance(error, getattr(torch, "AcceleratorError", ()))  # since torch 2.8
    return own or "CUDA error" in told or "Triton Error [CUDA]" in told


def measure(
    setting: Setting,
    contenders: Sequence[Contender],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    where: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Rows of one setting, the floor's first.

    Everything is built and checked before anything is timed: the two forms of a method must agree in outputs
    and gradients, a merged model with the model it came from, a compiled model with the eager one. Then every
    round runs every contender once (on a GPU: for a tenth of a second), in an order that rotates, and the
    floor before and after every `FLOOR_EVERY` of them; a contender's ratio is its time over the floor's,
    interpolated between the two runs of the floor around it. `where`: the rows' context, else taken now.

    A contender that does not work on this backbone gives a row with status "skipped", one that breaks or
    disagrees "failed", both with the reason; the others go on. `DeviceLost` where they cannot.
    """
    with _room_to_compile() if setting.engine != "eager" else contextlib.nullcontext():
        return _measure(setting, contenders, torch.device(device), rounds, where, say)


@contextlib.contextmanager
def _room_to_compile() -> Iterator[None]:
    """Every model is another specialisation of one forward: past its limit dynamo would go eager silently."""
    torch._dynamo.reset()
    config = torch._dynamo.config
    with config.patch(
        recompile_limit=1000, accumulated_recompile_limit=10_000, fail_on_recompile_limit_hit=True
    ):
        yield
    torch._dynamo.reset()


def _measure(setting, contenders, device: torch.device, rounds: int, where, say) -> list[dict]:
    backbones = _Backbones(setting, device)
    images, labels = _batch(backbones.get("plain method"), setting.batch_size, device)
    where = context(device) if where is None else where
    rows: dict[Contender, dict] = {}
    steps: dict[Contender, _Step] = {}

    def broke(contender: Contender, error: Exception) -> None:
        row = rows[contender]
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        if is_lost(error):
            # what is ready but not timed is no result
            raise DeviceLost(row["key"], [r for r in rows.values() if r["status"] != "ok"]) from error
        if contender == FLOOR and contender in steps:
            raise _FloorBroke from error

    for contender in [FLOOR, *contenders]:
        say(f"{setting.key()}  prepare {contender.label()}")
        rows[contender] = row = _row(setting, contender, backbones, where)
        try:
            step = _Step(setting, contender, backbones, images, labels)
            row |= step.describe()
            step._wait()  # an error of this contender must not show in the next
            steps[contender] = step
        except (BackboneError, OptionError) as error:
            row |= {"status": "skipped", "reason": str(error)}
        except Exception as error:  # of whatever kind: one contender must not cost the others their rows
            broke(contender, error)
        if rows[FLOOR]["status"] != "ok":
            break  # nothing to compare with
        _tidy(device)
    try:
        times, floors = _take_turns(
            steps, rounds, device, lambda i: say(f"{setting.key()}  round {i} of {rounds}"), broke
        )
    except _FloorBroke:
        times, floors = {}, {}
    for contender, row in rows.items():
        if contender in times:
            row |= _summary(times[contender], floors[contender], setting.batch_size)
        elif row["status"] == "ok":
            row |= {"status": "failed", "reason": f"not timed, the floor broke: {rows[FLOOR]['reason']}"}
    return list(rows.values())


class _Backbones:
    """The backbone of a setting, random from a seed; in float32 for methods that train its weights."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        self._made: dict[tuple, Backbone] = {}
        self.checked: dict[tuple, str] = {}

    def get(self, method: str) -> Backbone:
        setting = self.setting
        owns = method in frozen.OWNERS
        precision = "fp32" if owns else setting.dtype
        fold = setting.fold and (method in frozen.FOLDABLE or method in ("plain method", "floor"))
        return self.make(precision, setting.memory, fold)

    def make(self, precision: str, memory: str, fold: bool) -> Backbone:
        chosen = (precision, memory, fold)
        if chosen not in self._made:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                self._made[chosen] = load_backbone(
                    self.setting.backbone,
                    pretrained=False,
                    img_size=self.setting.img_size,
                    precision=precision,
                    memory=memory,
                    fold=fold,
                ).to(self.device)
        return self._made[chosen]


def _batch(backbone: Backbone, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(SEED)
    images = torch.randn(size, 3, *sides(backbone.img_size), generator=draw)
    return images.to(device), torch.randint(NUM_CLASSES, (size,), generator=draw).to(device)


def build(backbone: Backbone, contender: Contender) -> TunedModel:
    """The model of a contender, drawn from the seed; merged where that is its form."""
    options = dict(contender.options)
    if contender.form not in ("", "merged"):
        options["form"] = contender.form
    model = create(backbone, contender.method, num_classes=NUM_CLASSES, seed=SEED, **options)
    move_off_start(model)
    return model.merge() if contender.form == "merged" else model


@torch.no_grad()
def move_off_start(model: TunedModel) -> None:
    """Give parameters that start at exactly zero small random values: a form compared where half of it is
    zero is not compared."""
    draw = torch.Generator().manual_seed(SEED)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith("backbone.") and p.numel() and not p.any():
            p.copy_(0.01 * torch.randn(p.shape, generator=draw))


class _Step:
    """One contender, ready to be run: `run()` is one step, as it is timed."""

    def __init__(self, setting, contender, backbones, images: Tensor, labels: Tensor):
        self.setting, self.contender, self.images, self.labels = setting, contender, images, labels
        self.device, self.backbones = images.device, backbones
        self.backbone = backbones.get(contender.method)
        self.train = setting.mode == "train"
        started = time.perf_counter()
        if contender == FLOOR:
            self.model: nn.Module = self.backbone
        else:
            self.model = build(self.backbone, contender).to(self.device).train(self.train)
            pair = contender.method, contender.options, contender.form == "merged"
            if pair not in backbones.checked:
                backbones.checked[pair] = check(contender, backbones)
            self.checked = backbones.checked[pair]
        self.build_seconds = time.perf_counter() - started
        self.optimizer = None
        if self.train and contender != FLOOR:
            self.optimizer = torch.optim.AdamW(self.model.trainable_parameters(), lr=LEARNING_RATE)
        self.net = self._compiled()
        if contender == FLOOR and self.train:
            with torch.no_grad():
                rows = self.backbone.enter(images) if self.backbone.family != "cnn" else images
                if self.backbone.precision != "fp32":
                    rows = rows.to(torch.bfloat16)
                shape = self.backbone(images).shape
            self.rows = rows.detach().requires_grad_()
            self.upstream = torch.randn(shape, device=self.device, dtype=rows.dtype)

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        model = self.model
        if self.contender == FLOOR and self.train:
            net = lambda rows: model.pool(model.body(rows))  # noqa: E731
        else:
            net = model
        if self.setting.engine == "eager":
            return net
        return torch.compile(net, mode="reduce-overhead" if self.setting.engine == "graphs" else None)

    def autocast(self):
        # also casts, at each use, the float32 weights of methods that train the backbone's
        if self.setting.dtype != "fp32":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def run(self) -> Tensor | None:
        if self.setting.engine == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        if not self.train:
            with torch.no_grad(), self.autocast():
                return self.net(self.images)
        if self.optimizer is None:
            self.rows.grad = None
            self.net(self.rows).backward(self.upstream)
            return None
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        return None

    def loss(self) -> Tensor:
        """The forward of a training step."""
        with self.autocast():
            logits = self.net(self.images)
            loss = F.cross_entropy(logits.float(), self.labels)
            for term in self.model.loss_terms(self.images, self.labels).values():
                loss = loss + term
        return loss

    def describe(self) -> dict[str, Any]:
        """Everything about the contender that is not a time of a step."""
        started = time.perf_counter()
        self.run()
        self._wait()
        told: dict[str, Any] = {
            "status": "ok",
            "build_seconds": self.build_seconds,
            "first_step_seconds": time.perf_counter() - started,
        }
        if self.setting.engine != "eager":
            told["checked"] = self._check_compiled()
        with PeakMemory(self.device) as peak:
            before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
            self.run()
            self._wait()
        how = (
            peak.how
            if self.device.type != "cuda"
            else "peak of torch's CUDA allocator above its level at the start"
        )
        told |= {"peak_bytes": peak.bytes - before, "peak_measured": how}
        if self.contender != FLOOR:
            told |= describe_model(self.model, self.contender)
            told.setdefault("checked", self.checked)
        told["resident_bytes"] = resident_bytes(self.model, self.optimizer)
        told["macs_per_image"] = self._macs()
        if self.train:
            told["activation_bytes"] = self._activations()
        if not self.train and self.setting.dtype != "fp32":
            told["against_fp32"] = self._against_fp32()
        if hasattr(self.model, "diagnostics"):
            told["diagnostics"] = self.model.diagnostics()
        return told

    @torch.no_grad()
    def _against_fp32(self) -> dict[str, float]:
        """How far the outputs are from those in float32, and on how many images the largest is the same."""
        backbone = self.backbones.make("fp32", "plain", False)
        exact = backbone
        if self.contender != FLOOR:
            exact = build(backbone, self.contender).to(self.device).eval()
        expected, found = exact(self.images).float(), self.run().float()
        told = fp8.error(found, expected)._asdict()
        return told | {"same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item()}

    def _macs(self) -> float | None:
        if self.setting.engine != "eager" or self.setting.dtype == "fp8":
            return None  # the products are the same as the eager model's
        images, labels, rows = self.images, self.labels, getattr(self, "rows", None)
        few = min(2, len(images))
        try:
            self.images, self.labels = images[:few], labels[:few]
            if rows is not None:
                self.rows = rows[:few].detach().requires_grad_()
                upstream, self.upstream = self.upstream, self.upstream[:few]
            return counted_macs(self.run) / few
        finally:
            self.images, self.labels = images, labels
            if rows is not None:
                self.rows, self.upstream = rows, upstream

    def _activations(self) -> dict[str, int] | None:
        if self.setting.engine != "eager":
            return None  # autograd keeps nothing then that the hooks could see
        forward = self.loss if self.optimizer is not None else lambda: self.net(self.rows)
        exclude = [self.images, self.labels, *([self.rows] if self.optimizer is None else [])]
        kept = saved_bytes(self.model, forward, exclude)
        if self.device.type == "cuda":
            kept["by_allocator"] = cuda_activations(self.model, forward, exclude)
        return kept

    def _check_compiled(self) -> str:
        model = self.model
        if self.contender == FLOOR:
            eager, net = (
                (lambda: model.pool(model.body(self.rows))) if self.train else (lambda: model(self.images)),
                (lambda: self.net(self.rows if self.train else self.images)),
            )
        else:
            eager, net = lambda: model(self.images), lambda: self.net(self.images)
        if self.contender.method == "dyt" and self.train:
            return "not compared: draws noise"
        with torch.no_grad(), self.autocast():
            apart = distance(net().float(), eager().float())
        if not apart <= COMPILED_AGREES[self.setting.dtype]:
            raise Wrong(f"{self.contender.label()}: compiled and eager outputs differ by {apart:.1e}")
        told = f"compiled = eager to {apart:.1e}"
        if not self.train or self.contender == FLOOR:
            return told
        apart = distance(self._gradients(self.net), self._gradients(model))
        if not apart <= COMPILED_GRADIENTS_AGREE[self.setting.dtype]:
            raise Wrong(f"{self.contender.label()}: compiled and eager gradients differ by {apart:.1e}")
        return f"{told}, gradients to {apart:.1e}"

    def _gradients(self, net: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the cross-entropy by everything that is trained, in one vector."""
        with self.autocast():
            loss = F.cross_entropy(net(self.images).float(), self.labels)
        found = torch.autograd.grad(loss, list(self.model.trainable_parameters()), allow_unused=True)
        return torch.cat([g.float().flatten() for g in found if g is not None])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def describe_model(model: TunedModel, contender: Contender) -> dict[str, Any]:
    """Trained parameters, and what the adapter takes on disk; nothing is trained in a merged model."""
    told: dict[str, Any] = {
        "parameters": model.num_trainable(),
        "parameters_with_head": model.num_trainable(head=True),
    }
    if contender.form != "merged":
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(folder)
            told["adapter_bytes"] = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    return told


def forms_of(method: str) -> list[str]:
    """The forms a method is measured in: those of its option `form`, and "merged" where it merges."""
    cls = available()[method]
    forms = [""]
    if "form" in method_options(cls):
        # LION's two are two functions, the others' two ways to compute one
        forms = list(LION_FORMS) if method == "lion" else ["exact", "naive"]
    # a method that trains the backbone's own weights is the bare backbone once trained: nothing to merge
    if cls.merge is not TunedModel.merge and method not in frozen.OWNERS:
        forms.append("merged")
    return forms


def check(contender: Contender, backbones: _Backbones) -> str:
    """Compare a contender with its method's other form; what was compared and how far apart. `Wrong` raised.

    In float32, whatever the setting's dtype, on two images: outputs, and for two forms the gradients of every
    trained parameter. Methods without another form have nothing to compare here; the tests do that.
    """
    other = {"exact": "naive", "naive": "exact", "merged": ""}.get(contender.form)
    if contender.form in LION_FORMS:
        return "one way to compute it"
    if other is None:
        return "one form only"
    if contender.form in ("exact", "naive") and not _has_both(contender):
        return "one form only with these options"
    backbone = backbones.make("fp32", "plain", False)
    images, labels = _batch(backbone, 2, backbones.device)
    first = build(backbone, contender).to(backbones.device).eval()
    forms = forms_of(contender.method)
    second_form = other if contender.form != "merged" else next(f for f in forms if f != "merged")
    second = build(backbone, Contender(contender.method, contender.options, second_form))
    second = second.to(backbones.device).eval()
    if contender.form == "merged":
        with torch.no_grad():
            outputs = distance(first(images), second(images))
        if not outputs <= FORMS_AGREE:
            raise Wrong(f"{contender.label()}: merged and unmerged outputs differ by {outputs:.1e}")
        return f"merged = unmerged to {outputs:.1e}"
    found = []
    for model in (first, second):
        logits = model(images)
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found.append((logits.detach(), grads))
    (a, grads_a), (b, grads_b) = found
    outputs = distance(a, b)
    shared = sorted(grads_a.keys() & grads_b.keys())
    gradients = max((distance(grads_a[n], grads_b[n]) for n in shared), default=0.0)
    if not (outputs <= FORMS_AGREE and gradients <= FORMS_AGREE):
        raise Wrong(
            f"{contender.label()}: the exact and the naive form differ by {outputs:.1e} in outputs and "
            f"{gradients:.1e} in gradients; at most {FORMS_AGREE:.0e} is allowed"
        )
    return f"exact = naive to {outputs:.1e}, gradients to {gradients:.1e}"


def _has_both(contender: Contender) -> bool:
    return "depth" not in dict(contender.options) or dict(contender.options)["depth"] != "shallow"


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, and infinite where a number is not finite.

    >>> distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    a, b = a.double(), b.double()
    apart = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    return apart if math.isfinite(apart) else math.inf


Times = dict[Contender, list[float]]


def _take_turns(
    steps: dict[Contender, _Step], rounds: int, device, say, broke: Callable[[Contender, Exception], None]
) -> tuple[Times, Times]:
    """Seconds per step of every contender, one number per round, and of the floor at the same moments.

    One that breaks is told to `broke`, which raises where the others cannot go on, and is in neither.
    """
    times: Times = {contender: [] for contender in steps}
    floors: Times = {contender: [] for contender in steps}

    def timed(contender: Contender, repeats: int) -> float | None:
        try:
            return _timed(steps[contender], repeats, device)
        except Exception as error:
            broke(contender, error)
            del times[contender], floors[contender]
            return None

    repeats = {}
    for contender in steps:
        timed(contender, 1)  # warms up
        if contender in times and (seconds := timed(contender, 1)) is not None:
            repeats[contender] = max(1, math.ceil(ROUND_SECONDS.get(device.type, 0.0) / max(seconds, 1e-6)))
    for i in range(rounds if FLOOR in steps else 0):
        say(i + 1)
        rivals = [contender for contender in times if contender != FLOOR]
        turn = i % max(len(rivals), 1)
        order = rivals[turn:] + rivals[:turn]
        before = timed(FLOOR, repeats[FLOOR])
        own = [before]
        for start in range(0, len(order), FLOOR_EVERY):
            some = order[start : start + FLOOR_EVERY]
            for contender in some:
                if (seconds := timed(contender, repeats[contender])) is not None:
                    times[contender].append(seconds)
            after = timed(FLOOR, repeats[FLOOR])
            for k, contender in enumerate(some, 1):
                if contender in times:
                    floors[contender].append(before + (after - before) * k / (len(some) + 1))
            before = after
            own.append(after)
        times[FLOOR].append(statistics.fmean(own))
        floors[FLOOR].append(times[FLOOR][-1])
    return times, floors


def _timed(step: _Step, repeats: int, device: torch.device) -> float:
    step._wait()
    started = time.perf_counter()
    for _ in range(repeats):
        step.run()
    step._wait()
    return (time.perf_counter() - started) / repeats


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile.

    >>> quantiles([1, 2, 3, 4, 5, 6])
    (3.5, 2.0, 5.0)
    """
    if len(values) == 1:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def _summary(seconds: list[float], floor: list[float], batch_size: int) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(seconds, floor, strict=True)]
    told = {"rounds": len(seconds)}
    for name, values in (("seconds", seconds), ("ratio", ratios)):
        told |= dict(zip((name, f"{name}_q20", f"{name}_q80"), quantiles(values), strict=True))
    told["images_per_second"] = batch_size / told["seconds"]
    told["floor_seconds"] = statistics.median(floor)
    return told


def _row(setting: Setting, contender: Contender, backbones: _Backbones, where: dict) -> dict[str, Any]:
    backbone = backbones.get(contender.method)
    return {
        "key": f"{setting.key()}/{contender.label()}",
        "setting": setting.key(),
        "status": "failed",
        "reason": None,
        "method": contender.method,
        "label": contender.label(),
        "form": contender.form,
        "options": dict(contender.options),
        "num_classes": NUM_CLASSES,
        "backbone": backbone.name,
        "weights_source": backbone.weights_source,
        "weights_sha256": backbone.weights_sha256,
        "img_size": backbone.img_size,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.interpolation,
        "mode": setting.mode,
        "batch_size": setting.batch_size,
        "dtype": setting.dtype,
        "held_in": backbone.precision,
        "engine": setting.engine,
        "memory": backbone.memory,
        "folded": backbone.folded,
        "seed": SEED,
        **where,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def keys(setting: Setting, contenders: Sequence[Contender]) -> Iterator[str]:
    """The keys of the rows that `measure` gives."""
    for contender in [FLOOR, *contenders]:
        yield f"{setting.key()}/{contender.label()}"
