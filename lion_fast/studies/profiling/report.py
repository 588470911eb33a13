"""What was measured of a model, as report.md with plots, and as profile.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_fast.files import make_folder, write_atomically
from lion_fast.studies.markdown import table, where_taken
from lion_fast.studies.profiling import plots
from lion_fast.studies.profiling.parts import PARTS

JSON_NAME, REPORT_NAME = "profile.json", "report.md"
_KINDS = {
    "train": "a training step: forward, backward, optimiser",
    "cached": "a training step as `fit` takes it, on rows of the backbone that are computed once",
    "infer": "a forward without gradients",
}
_HOW_TIMED = (
    "The parts of a step add up to the whole of it. Shown are medians over the steps, with the 20 % and 80 %",
    'quantiles, and shares of the time of all steps. "method" is what a method does beside its ends, "other"',
    "what lies between the parts: the start of the backward, what is let go. On CUDA times are the device's.",
)


def write(found: Mapping[str, Any], folder: Path) -> None:
    """profile.json, the plots and report.md of what is known so far."""
    make_folder(folder)
    write_atomically(folder / JSON_NAME, (json.dumps(found, indent=1) + "\n").encode())
    drawn = plots.draw_all(found, folder)
    write_atomically(folder / REPORT_NAME, markdown(found, drawn).encode())


def markdown(found: Mapping[str, Any], drawn: Mapping[str, str] | None = None) -> str:
    """The report; `drawn` are the plots' files by what they show."""
    drawn = drawn or {}
    lines = [f"# Profile of {found['method']} on {found['backbone']}", ""]
    if found.get("interrupted"):
        lines += ["**Interrupted: what is not here was not measured.**", ""]
    lines += [f"Measured on {where_taken(found)}.", "", *_model(found), ""]
    lines += _ends(found)
    if "time" in drawn:
        lines += ["## Time by part", "", *_HOW_TIMED, "", f"![time by part]({drawn['time']})", ""]
    if "memory" in drawn:
        lines += ["## Memory", "", f"![memory]({drawn['memory']})", ""]
    for kind, told in found["modes"].items():
        lines += [f"## {kind}: {_KINDS[kind]}", ""]
        lines += _time(told) + _memory(told) + _operators(told, found["device"] == "cuda")
        if "trace" in told:
            lines += [f"Trace, to open at ui.perfetto.dev: [{told['trace']}]({told['trace']}).", ""]
        if "snapshot" in told:
            lines += _snapshot(told["snapshot"])
    return "\n".join(lines).rstrip() + "\n"


def _model(found: Mapping[str, Any]) -> list[str]:
    counts = found["parameters"]
    size = " x ".join(map(str, found["img_size"]))
    lines = [
        f"- method {found['method']} {json.dumps(found['options'])}",
        f"- backbone {found['backbone']}, weights: {found['weights_source']}, sha256 "
        f"{found['weights_sha256'][:12]}, held in {found['held_in']}, memory {found['memory']}"
        + (", folded" if found["folded"] else ""),
        f"- a batch of {found['batch_size']}, {size} pixels, {found['num_classes']} classes; "
        f"images: {found['images']}",
        f"- mixed precision {found['mixed_precision']}, optimiser {found['optimizer']}",
        f"- trained parameters {counts['dense']:,}, kept {counts['kept']:,}, "
        f"with head {counts['with_head']:,}",
    ]
    random = found["weights_source"].startswith("random")
    if found["ends"]:
        lines += [
            "",
            "Iterations, and so the time of an end, depend on images and weights, the end's included.",
        ]
        if random:
            lines += ["**The backbone's weights are random**: with trained ones iterations are others; the"]
            lines += ["rest costs the same."]
    elif random:
        lines += ["", "The backbone's weights are random, which costs what trained ones cost."]
    return lines


_END = ("end", "gamma", "certified bound", "measured rate", "iterations, mean", "at most", "worst residual")


def _ends(found: Mapping[str, Any]) -> list[str]:
    if not found["ends"]:
        return []
    lines = [
        [
            name,
            f"{end['gamma']:g}",
            f"{end['certified']:.4f}",
            f"{end['rate']:.4f}",
            f"{end['iterations']:.2f}",
            f"{end['max_iterations']:.0f}",
            f"{end['residual']:.1e}",
            f"{end['converged']:.1%}",
        ]
        for name, end in found["ends"].items()
    ]
    about = "In evaluation, on these images, at the layer's own tolerance."
    head = ["## Equilibria", "", about, "", *table((*_END, "rows converged"), lines)]
    return [*head, "", *_in_steps(found["modes"]), ""]


def _in_steps(modes: Mapping[str, Any]) -> list[str]:
    """What the solver said in the steps themselves, once for those that agree."""
    kinds: dict[str, list[str]] = {}
    for kind, told in modes.items():
        if told.get("diagnostics"):
            words = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in told["diagnostics"].items())
            kinds.setdefault(words, []).append(kind)
    return [f"- in steps of {', '.join(some)}: {words}" for words, some in kinds.items()]


def _time(told: Mapping[str, Any]) -> list[str]:
    if "parts" not in told:
        return []
    whole, clocked, parts = told["seconds"], told["clocked"]["seconds"], told["parts"]
    lines = [
        f"{_ms(told)} ms a step, {told['images_per_second']:.1f} images a second; the first step took "
        f"{told['first_step_seconds']:.2f} s. With the clock that tells the parts {_ms(told['clocked'])} ms, "
        f"{clocked / whole - 1:+.1%}; {len(told['steps'])} steps of each.",
        "",
    ]
    rows = []
    for part in PARTS:
        at = {phase: inside[part] for phase, inside in parts.items() if part in inside}
        if at:
            rest = at.get("optimiser") or at.get("other")
            cells = [_ms(found) if found else "" for found in (at.get("forward"), at.get("backward"), rest)]
            rows.append([part, *cells, f"{sum(f['share'] for f in at.values()):.1%}"])
    return [*lines, *table(("part", "forward ms", "backward ms", "other ms", "share"), rows), ""]


def _ms(spread: Mapping[str, float]) -> str:
    low, high = spread["seconds_q20"], spread["seconds_q80"]
    return f"{1e3 * spread['seconds']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})"


def _memory(told: Mapping[str, Any]) -> list[str]:
    if "peak_bytes" not in told:
        return []
    sizes = plots.memory_rows(told)
    sizes |= {f"by the allocator: {name}": size for name, size in told.get("allocator_bytes", {}).items()}
    sizes[told["peak_measured"]] = told["peak_bytes"]
    return [*table(("memory", "MiB"), [[name, f"{size / 2**20:.2f}"] for name, size in sizes.items()]), ""]


def _operators(told: Mapping[str, Any], device: bool) -> list[str]:
    if not told.get("operators"):
        return []
    clocks = {"cpu_seconds": "CPU ms"} | ({"device_seconds": "device ms"} if device else {})
    rows = [
        [f"`{row['name']}`", str(row["calls"]), *(f"{1e3 * row[clock]:.2f}" for clock in clocks)]
        for row in told["operators"]
    ]
    return [*table(("operator, by its own time in one step", "calls", *clocks.values()), rows), ""]


def _snapshot(names: Mapping[str, str]) -> list[str]:
    return [
        f"![level of the CUDA allocator over a step]({names['plot']})",
        "",
        f"The allocator's snapshot, for pytorch.org/memory_viz: [{names['pickle']}]({names['pickle']}); as a "
        f"page that loads its drawing code from the network: [{names['html']}]({names['html']}).",
        "",
    ]
