"""What is installed, which methods there are, or what an adapter holds.

examples:
  lion-fast info                                  versions, device, Triton
  lion-fast info --methods                        methods and their options
  lion-fast info runs/photos --images holiday/    an adapter: parameters, bound, measured rate, iterations
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from lion_fast.commands.common import add_adapter, load_run, sample_images

if TYPE_CHECKING:
    from lion_fast.methods import TunedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is told."""
    add_adapter(parser, nargs="?")
    parser.add_argument("--methods", action="store_true", help="list methods and their options")
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="measure on these images [on random ones]"
    )


def run(args: argparse.Namespace) -> dict:
    """Print what is installed, the methods, or an adapter."""
    result, lines = _methods() if args.methods else _adapter(args) if args.adapter else _installation()
    if not args.json:
        print("\n".join(lines))
    return result


def _installation() -> tuple[dict, list[str]]:
    from lion_fast.inspection import environment

    result = environment()
    shown = {name: value for name, value in result.items() if name != "triton_reason"}
    shown["triton"] = "yes" if result["triton"] else f"no: {result['triton_reason']}"
    return result, [f"{name:<12} {value}" for name, value in shown.items()]


def _methods() -> tuple[dict, list[str]]:
    from lion_fast.methods import available, method_options

    result, lines = {}, []
    for name, method in available().items():
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in method_options(method).items()}
        result[name] = {
            "summary": method.summary
            or (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0],
            "backbones": list(method.families),
            "options": options,
        }
        lines += [f"{name}\n  {result[name]['summary']}\n  backbones: {', '.join(method.families)}"]
        lines += [f"  --set {option}={json.dumps(default)}" for option, default in options.items()]
    return result, lines


def _reading(model: "TunedModel") -> list[str]:
    from lion_fast.training.choosing import in_words

    if not model.chosen:
        return []
    how = f"chosen on {model.chosen['images']:,} training images"
    return [f"reading     {in_words(model.chosen)} ({how})"]


def _adapter(args: argparse.Namespace) -> tuple[dict, list[str]]:
    from lion_fast.inspection import measure_ends, parameter_counts
    from lion_fast.pruning import describe_storage

    model, _, folder = load_run(args.adapter, weights=args.weights)
    images, measured_on = sample_images(args.images, model.backbone, 32 if args.images else 8)
    result: dict[str, Any] = {
        "adapter": str(folder),
        "method": model.method,
        "options": model.options,
        "backbone": model.backbone.name,
        "weights_source": model.backbone.weights_source,
        "caveat": model.backbone.caveat,
        "classes": model.classes,
        "chosen": model.chosen,
        "parameters": parameter_counts(model),
        "ends": measure_ends(model, images.to(next(model.parameters()).device)),
        "forms": describe_storage(model),
        "measured_on": measured_on,
    }
    lines = [
        f"method      {model.method} {json.dumps(model.options)}",
        f"backbone    {model.backbone.name}, weights: {model.backbone.weights_source}",
        *([f"mind        {model.backbone.caveat}"] if model.backbone.caveat else []),
        f"classes     {model.num_classes}: {', '.join(model.classes or [])}",
        *_reading(model),
        "parameters  dense {dense:,}, kept {kept:,}, with head {with_head:,}".format(**result["parameters"]),
    ]
    lines += [
        "{name} end: gamma {gamma:g}, certified bound {certified:.4f}, measured rate {rate:.4f}, "
        "iterations {iterations:.1f} (at most {max_iterations:.0f}), residual {residual:.1e}".format(
            name=name, **end
        )
        for name, end in result["ends"].items()
    ]
    for name, storage in result["forms"].items():
        lines += [f"{name}: best storage {storage['name']}: {storage['reason']}"]
    return result, lines + ([f"measured on {measured_on}"] if result["ends"] else [])
