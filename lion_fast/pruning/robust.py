"""Robust training: critical entries learn, the others only shrink, until they are cut off."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.masked import Masked
from lion_fast.errors import CheckpointError, OptionError, check_choice, check_number, check_seed, check_whole
from lion_fast.options import CRITERIA
from lion_fast.pruning.counts import count_parameters
from lion_fast.pruning.masks import Matrix, check_target, find_layers, find_matrices, select

PHASES = ("dense", "robust", "frozen", "hard")


class RobustPruner:
    """Prunes LionLayers while an optimiser trains them; `step()` takes the place of `optimizer.step()`.

    Each step scores every entry of A, W and V (biases are exempt) by the running mean of |w dL/dw| over
    about `ema` steps. The best ceil(keep * m) of all m entries of all layers together are critical and get
    the optimiser's update. The others get w <- sgn(w) max(|w| - lr decay, 0) instead: no gradient, no
    weight decay, and their momentum and second moments stay as they are. Four phases by the step's number:

        [0, warmup)           dense: all learn, scores are gathered
        [warmup, freeze)      robust: a new mask every `refresh` steps
        [freeze, hard)        frozen: the last mask stays
        [hard, total_steps)   hard: w = 0 off the mask, which the layers carry from now on

    The contraction bound needs no care: a layer bounds its W as it is, at every forward pass.

    Args:
        target: a model with LionLayers or StateLayers, a layer, or layers.
        optimizer: what trains them; elementwise (SGD, Adam, AdamW and the like), not sharded.
        keep: share 1 - tau of the entries, hidden units or blocks to keep, in (0, 1].
        total_steps: optimiser steps of the whole training.
        granularity: "element"; "unit" (row of A, row and column of W, column of V together: what
            `compact` takes away; in a StateLayer, which has no V, the unit's state stays at phi(b));
            "block" (squares of `block`: what the block-sparse kernels skip); "2:4".
        block: 16, 32 or 64.
        criterion: "saliency" (the score above), "magnitude" or "random" (drawn once, from `seed`).
        scope: rank over all layers ("global"), or within each "layer" or "matrix".
        warmup, freeze, hard: steps, or shares of total_steps where they are floats. hard=None: as freeze.
        refresh: steps between masks; None is a twentieth of total_steps.
        decay: the lambda above. With a learning rate of 1e-3 an entry loses 1e-5 a step at the default:
            well below 1e-2 nothing decays in time and `hard` cuts off large weights. `report` says how
            much is left.
        ema: steps over which scores are averaged; None is `refresh`.
        scale_gradient: multiply the gradients of critical entries by `keep`, as Xia et al. do.
        regrow: of the kept count, the share given at each refresh to the entries off the mask with the
            largest mean |dL/dw|. Without it an entry that has reached 0 never returns: its score stays 0.

    Every rank of a `torch.distributed` group uses rank 0's masks. Where a GradScaler is in use, give it to
    `step`. Gradients are clipped before `step`, non-critical ones included.

    Raises OptionError for options that do not fit, frozen or compacted layers, parameters that the
    optimiser does not have.

    Source: robust training after Xia et al., "Robust early-learning", ICLR 2021, as LION
    (arXiv 2303.09992) is read here; units, blocks, 2:4 and regrowth are this project's own.

    >>> from lion_fast import LionLayer
    >>> layer = LionLayer(8, 4)
    >>> pruner = RobustPruner(layer, torch.optim.SGD(layer.parameters(), lr=0.1), keep=0.5, total_steps=4)
    >>> for _ in range(4):
    ...     layer(torch.randn(3, 8)).square().sum().backward()
    ...     pruner.step()
    >>> pruner.finalize()["kept_share"]
    0.5
    """

    def __init__(
        self,
        target: nn.Module | Iterable[Masked] | Mapping[str, Masked],
        optimizer: torch.optim.Optimizer,
        *,
        keep: float,
        total_steps: int,
        granularity: str = "element",
        block: int = 32,
        criterion: str = "saliency",
        scope: str = "global",
        warmup: int | float = 0.1,
        refresh: int | None = None,
        freeze: int | float = 0.75,
        hard: int | float | None = None,
        decay: float = 1e-2,
        ema: int | None = None,
        scale_gradient: bool = False,
        regrow: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_choice("criterion", criterion, CRITERIA)
        check_seed("seed", seed)
        check_whole("total_steps", total_steps)
        refresh = max(1, total_steps // 20) if refresh is None else refresh
        ema = refresh if ema is None else ema
        check_whole("refresh", refresh)
        check_whole("ema", ema)
        check_number("decay", decay, least=0)
        check_number("regrow", regrow, least=0, below=1)
        if regrow and criterion != "saliency":
            raise OptionError(f"regrow goes with criterion='saliency'; got criterion={criterion!r}")
        self.target, self.optimizer = target, optimizer
        self.layers = find_layers(target)
        self.matrices = find_matrices(self.layers)
        check_target(self.matrices, keep, granularity, block, scope)
        for name, layer in self.layers.items():
            if layer.masks():
                raise OptionError(
                    f"{name or 'the layer'} is pruned already; set_mask(name, None) takes its masks away, "
                    "load_state_dict goes on with the pruner that made them"
                )
        self.keep, self.granularity, self.block, self.scope = float(keep), granularity, block, scope
        self.criterion, self.total_steps, self.refresh, self.ema = criterion, total_steps, refresh, ema
        self.decay, self.scale_gradient, self.regrow = float(decay), scale_gradient, float(regrow)
        self.warmup, self.freeze = self._steps("warmup", warmup), self._steps("freeze", freeze)
        self.hard = self.freeze if hard is None else self._steps("hard", hard)
        if not self.warmup <= self.freeze <= self.hard <= total_steps:
            raise OptionError(
                "the phases must follow each other: warmup <= freeze <= hard <= total_steps; got "
                f"{self.warmup}, {self.freeze}, {self.hard} and {total_steps} steps"
            )
        self._groups = self._find_groups()
        self.steps_done, self.refreshes = 0, 0
        self.masks: dict[str, Tensor] = {}
        self._hard = False
        self._scores = {m.full_name: self._zeros(m) for m in self.matrices}
        self._growth = {m.full_name: self._zeros(m) for m in self.matrices} if regrow else {}
        if criterion == "random":
            generator = torch.Generator().manual_seed(seed)
            for score in self._scores.values():
                score.copy_(torch.rand(score.shape, generator=generator))

    def _steps(self, name: str, value: int | float) -> int:
        if isinstance(value, float) and 0 <= value <= 1:
            return round(value * self.total_steps)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise OptionError(
            f"{name} must be a number of steps, or a share of total_steps as a float in [0, 1]; got {value!r}"
        )

    @staticmethod
    def _zeros(matrix: Matrix) -> Tensor:
        return torch.zeros_like(matrix.parameter, dtype=torch.float32, memory_format=torch.contiguous_format)

    def _find_groups(self) -> dict[str, int]:
        """The optimiser's group of each matrix; groups are kept by index, as schedulers may replace them."""
        place = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for m in self.matrices:
            if id(m.parameter) not in place:
                raise OptionError(
                    f"the optimizer does not have {m.full_name}; give it the model's parameters, as they are "
                    "after moving the model"
                )
            if hasattr(m.parameter, "to_local") or not m.parameter.is_floating_point():
                raise OptionError(f"{m.full_name} is sharded; prune under data parallelism (DDP) instead")
        return {m.full_name: place[id(m.parameter)] for m in self.matrices}

    @property
    def phase(self) -> str:
        """What the next step is: "dense", "robust", "frozen" or "hard"."""
        bounds = (self.warmup, self.freeze, self.hard)
        return "hard" if self._hard else PHASES[sum(self.steps_done >= bound for bound in bounds)]

    @torch.no_grad()
    def step(self, scaler: "torch.amp.GradScaler | None" = None) -> None:
        """Score, refresh the mask where it is due, and make the optimiser's step on the critical entries.

        To be called once per optimiser step, after `backward` and before `zero_grad`.
        """
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        now = self.steps_done
        if now < self.freeze or not self.masks:
            self._score()
        if now >= self.warmup and (
            not self.masks or (now < self.freeze and (now - self.warmup) % self.refresh == 0)
        ):
            self._refresh()
        if now >= self.hard:
            self._cut()
        if self.masks:
            self._masked_step(scaler)
        else:
            self._optimizer_step(scaler)
        self.steps_done += 1

    def _optimizer_step(self, scaler) -> None:
        with torch.enable_grad():
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)

    def _score(self) -> None:
        if self.criterion != "saliency":
            return
        weight = 1 / self.ema
        for m in self.matrices:
            if m.parameter.grad is None:
                continue
            grad = m.parameter.grad.float()
            # An overflow of mixed precision, whose step the scaler skips, must not stay in the mean.
            finite = torch.isfinite(grad).all()
            for found, new in ((self._scores, (m.parameter * grad).abs()), (self._growth, grad.abs())):
                if found:
                    mean = found[m.full_name]
                    mean.copy_(torch.where(finite, torch.lerp(mean, new.float(), weight), mean))

    def _refresh(self) -> None:
        scores = self._scores
        if self.criterion == "magnitude":
            scores = {m.full_name: m.parameter.detach().abs().float() for m in self.matrices}
        first = not self.masks
        if first and self.criterion == "saliency":
            self._warn_of_zeros()
        self.masks = _from_first_rank(
            select(
                self.matrices, scores, self.keep, self.granularity, self.block, self.scope,
                self._growth, self.regrow if not first else 0.0,
            )
        )  # fmt: skip
        self.refreshes += 1

    def _warn_of_zeros(self) -> None:
        dead = [name for name, score in self._scores.items() if not score.any()]
        if dead:
            warnings.warn(
                f"no entry of {', '.join(dead)} scores above zero, so their mask is arbitrary: is V zero "
                "(then no gradient reaches A and W), or is there no warm-up?",
                stacklevel=4,
            )

    def _masked_step(self, scaler) -> None:
        """The optimiser's step, undone off the mask, where the proximal step takes its place.

        Everything is taken back and not only the gradient withheld: with a gradient of zero a momentum
        still moves an entry, and decoupled weight decay too.
        """
        before = []
        for m in self.matrices:
            p, mask = m.parameter, self.masks[m.full_name]
            state = self.optimizer.state.get(p, {})
            kept = {k: v.clone() for k, v in state.items() if _is_elementwise(v, p)}
            before.append((m, p.grad, p.detach().clone(), kept))
            if p.grad is not None:
                p.grad = p.grad * mask * (self.keep if self.scale_gradient else 1)
        self._optimizer_step(scaler)
        for m, grad, old, kept in before:
            p, mask = m.parameter, self.masks[m.full_name]
            p.grad = grad
            step = self.optimizer.param_groups[self._groups[m.full_name]]["lr"] * self.decay
            shrunk = old.sign() * (old.abs() - step).clamp_min(0)
            p.copy_(torch.where(mask, p, shrunk))
            for key, value in self.optimizer.state.get(p, {}).items():
                if _is_elementwise(value, p):
                    value.copy_(torch.where(mask, value, kept.get(key, torch.zeros_like(value))))

    def _cut(self) -> None:
        if not self._hard:
            for m in self.matrices:
                m.module.set_mask(m.name, self.masks[m.full_name])
            self._hard = True

    @torch.no_grad()
    def finalize(self) -> dict[str, Any]:
        """Cut off what is off the mask, whatever the phase, and return the `report`; safe to repeat."""
        if not self.masks:
            self._refresh()
        self._cut()
        return self.report()

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """What is kept, per matrix and in all; JSON-able. Reading it waits for the device.

        `matrices`: per matrix `kept`, `total`, `share`, and off the mask the share of exact zeros
        (`decayed`) and the largest |w| (`largest_off_mask`), which a hard cut would take away at once.
        `kept_share`: of all prunable entries. `parameters`: see `count_parameters`, by the mask of now; the
        head is `target.head`.
        """
        matrices, kept, total = {}, 0, 0
        for m in self.matrices:
            mask = self.masks.get(m.full_name, torch.ones_like(m.parameter, dtype=torch.bool))
            size, count, off = mask.numel(), int(mask.sum()), m.parameter.detach()[~mask]
            matrices[m.full_name] = {
                "kept": count,
                "total": size,
                "share": count / size,
                "decayed": float((off == 0).float().mean()) if off.numel() else None,
                "largest_off_mask": float(off.abs().max()) if off.numel() else 0.0,
            }
            kept, total = kept + count, total + size
        whole = isinstance(self.target, nn.Module)
        model = self.target if whole else nn.ModuleList(self.layers.values())
        counts = count_parameters(model, getattr(model, "head", None))
        # Before the cut the layers do not carry the mask yet.
        dropped = 0 if self._hard else total - kept
        return {
            "phase": self.phase,
            "step": self.steps_done,
            "refreshes": self.refreshes,
            "keep": self.keep,
            "kept_share": kept / total,
            "matrices": matrices,
            "parameters": {
                "dense": counts["dense"],
                "kept": counts["kept"] - dropped,
                "kept_with_head": counts["kept_with_head"] - dropped,
            },
        }

    def _options(self) -> dict[str, Any]:
        names = (
            "keep granularity block scope criterion total_steps refresh ema decay scale_gradient regrow "
            "warmup freeze hard"
        )
        return {name: getattr(self, name) for name in names.split()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the same bits; tensors are copies.

        `options`, `steps_done`, `refreshes`, `is_hard`, and tensors by matrix: `masks`, `scores`, `growth`.
        """
        copies = {"masks": self.masks, "scores": self._scores, "growth": self._growth}
        return {
            "options": self._options(),
            "steps_done": self.steps_done,
            "refreshes": self.refreshes,
            "is_hard": self._hard,
            **{key: {k: t.detach().clone() for k, t in found.items()} for key, found in copies.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the model's and the optimiser's states are loaded by the caller.

        Raises CheckpointError where it belongs to a pruner with other options or other matrices.
        """
        differing = [
            f"{name} was {state['options'].get(name)!r}, now {value!r}"
            for name, value in self._options().items()
            if state["options"].get(name) != value
        ]
        if differing:
            raise CheckpointError(f"the pruner's state is from another run: {'; '.join(differing)}")
        shapes = {m.full_name: m.parameter.shape for m in self.matrices}
        for key in ("masks", "scores", "growth"):
            found = {name: t.shape for name, t in state[key].items()}
            if found != (shapes if found or key == "scores" else {}):
                raise CheckpointError(
                    f"the pruner's {key} are of {', '.join(found) or 'nothing'} and do not fit this model's "
                    f"{', '.join(shapes)}"
                )
        place = {m.full_name: m.parameter.device for m in self.matrices}
        for own, key in ((self._scores, "scores"), (self._growth, "growth")):
            for name, tensor in state[key].items():
                own[name].copy_(tensor)
        self.masks = {k: t.to(place[k], torch.bool, copy=True) for k, t in state["masks"].items()}
        self.steps_done, self.refreshes = int(state["steps_done"]), int(state["refreshes"])
        self._hard = False
        if state["is_hard"]:
            self._cut()


def _is_elementwise(value: object, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape and p.ndim > 0


def _from_first_rank(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's masks on every rank of the process group, where there is one."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks
    flat = torch.cat([mask.flatten() for mask in masks.values()]).to(torch.uint8)
    dist.broadcast(flat, 0)
    parts = flat.bool().split([mask.numel() for mask in masks.values()])
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def kept_shares(target: nn.Module | Iterable[Masked] | Mapping[str, Masked]) -> dict[str, float]:
    """The share of entries that each matrix' mask keeps, by full name; 1 without a mask."""
    matrices = find_matrices(find_layers(target))
    masks = {m.full_name: m.module.masks().get(m.name, torch.ones(1)) for m in matrices}
    return {name: float(mask.float().mean()) for name, mask in masks.items()}
