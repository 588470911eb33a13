"""What commands share: flags made from settings, the device, trained models, images, what is said."""

import argparse
import codecs
import math
import os
import select
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lion_fast.errors import DataError, OptionError, check_device, shown
from lion_fast.options import PRECISIONS, Options, help_of, key_values, kind, read_settings, sides
from lion_fast.training.settings import Settings

if TYPE_CHECKING:
    import torch

    from lion_fast.backbones import Backbone
    from lion_fast.data.duplicates import Stored
    from lion_fast.data.record import Record
    from lion_fast.methods import TunedModel

_FLAGS = {"options": "--set", "backbone_options": "--backbone-set"}
NAMES = "lion_fast_names"  # how texts with names in them are encoded


def _encode_name(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file name that is no UTF-8, as they are; else an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(NAMES, _encode_name)


def prepare_streams() -> None:
    """Have stdout take every name, and stdout and stderr be there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=NAMES)


@contextmanager
def flushed() -> Iterator[None]:
    """Stdout is written to its end, or the reason why it cannot be is raised."""
    try:
        yield
    finally:
        sys.stdout.flush()


def is_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence(stream: TextIO) -> None:
    """Drop what is left to write to a stream that cannot be written: Python would try again at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def plain(value: Any) -> Any:
    """A result as strict JSON has it: a number that is not finite is null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flag(name: str) -> str:
    """The flag of a setting."""
    return _FLAGS.get(name) or "--" + name.replace("_", "-")


def add_settings(parser, part: type[Options], names: Container[str], **defaults: str) -> None:
    """A flag for each of these settings; the parsed arguments hold those that are given, and no others.

    defaults: in words, where the command has others than the settings.
    """
    for option in fields(part):
        if option.name not in names:
            continue
        text, value = help_of(option, defaults.get(option.name)).replace("%", "%%"), kind(option)
        how: dict[str, Any] = {"type": value, "metavar": value.__name__.upper()}
        if value is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif value is dict:
            how, text = {"action": "append", "metavar": "KEY=VALUE"}, f"{text}; may be repeated"
        parser.add_argument(flag(option.name), dest=option.name, default=argparse.SUPPRESS, help=text, **how)


def given_settings(args: argparse.Namespace, *parts: type[Options]) -> dict[str, Any]:
    """The settings of these parts that flags gave."""
    return {
        option.name: key_values(value, flag(option.name)) if kind(option) is dict else value
        for part in parts
        for option in fields(part)
        if (value := getattr(args, option.name, None)) is not None
    }


def add_adapter(parser: argparse.ArgumentParser, **how: Any) -> None:
    """ADAPTER, and where its backbone's weights are."""
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder, or the output folder of finetune", **how
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="the backbone's weights, where they are not where they were"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """How a model reads images."""
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass [64]")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images [0]")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="[no]")
    add_device(parser)
    add_progress(parser)


def running(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_running` added, as `evaluate` and `predict_files` take it."""
    names = ("batch_size", "num_workers", "mixed_precision")
    return {name: getattr(args, name) for name in names} | {"progress": shows_progress(args)}


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... [the accelerator that is there, else cpu]")


def find_device(name: str | None) -> "torch.device":
    """The device of that name, or the one that is there."""
    import torch

    return check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def add_progress(parser: argparse.ArgumentParser) -> None:
    """--progress."""
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress [on a terminal]")


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether progress is asked for, or there is a terminal to show it on."""
    return sys.stderr.isatty() if args.progress is None else args.progress


def progress_line(args: argparse.Namespace) -> Callable[[str], None]:
    """What says how far a command is, in one line of the terminal; silent where no progress is shown."""
    shows = shows_progress(args)
    return lambda text: say(text, passing=True) if shows else None


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """An interruption says `hint` as its last line."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args, error.hint = ("interrupted",), hint
        raise


def processes() -> int:
    """How many processes share this run, as their launcher says."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise OptionError(f"the variable WORLD_SIZE must be a whole number; got {shown(text)}")
    return int(text)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes() <= 1 or os.environ.get("RANK") == "0"


def say(text: str, passing: bool = False) -> None:
    """A line on stderr; `passing`: one that the next takes the place of, on a terminal."""
    if passing:
        text = f"{text[:118]:<118}"
    print(text, end="\r" if passing and sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def adapter_folder(given: str) -> Path:
    """The adapter's folder of an adapter folder or an output folder of finetune."""
    folder = Path(given)
    return folder / "adapter" if (folder / "adapter" / "adapter.json").is_file() else folder


def load_run(
    given: str, device: str | None = None, weights: str | None = None
) -> tuple["TunedModel", Settings, Path]:
    """The model of an adapter folder or an output folder of finetune, its settings, the adapter's folder.

    The settings are the defaults where no config.yaml of a run lies beside the adapter.
    """
    from lion_fast.adapters import load_adapter

    folder = adapter_folder(given)
    on, config = find_device(device), folder.parent / "config.yaml"
    values = read_settings(config, "config file") if config.is_file() else {}
    settings = Settings.from_dict(values if values.keys() <= set(Settings.names()) else {})
    backbone = None
    if weights is None and not settings.model.pretrained and settings.model.weights is None:
        backbone = settings.model.load_backbone(settings.train.seed)  # random: its seed makes it again
    return load_adapter(folder, backbone, device=on, weights=weights), settings, folder


def find_record(run: Path) -> "Record | None":
    """The split of the run in this folder; None where there is none, or, said, none that can be read."""
    from lion_fast.data.record import record_of

    try:
        return record_of(run)[0]
    except DataError as error:
        say(f"which images the adapter was trained on is not known: {error}")
        return None


def tell_trained(
    record: "Record | None", settings: Settings, given: Sequence[str], images: Sequence["Stored"]
) -> int | None:
    """How many of these images the adapter was trained on, said where there are some; None where unknown.

    given: what the command was told to read. images: paths, or pixels.
    """
    from lion_fast.data.record import count_trained

    own = settings.data.data
    if record is not None:
        count = count_trained(record, images, own)
        if count:
            say(f"{count:,} of these {len(images):,} images are training images of this adapter")
        return count
    if own:
        home = Path(os.path.realpath(own))
        for place in map(Path, map(os.path.realpath, given)):
            if place == home or place in home.parents or home in place.parents:
                say(f"{own} is what this adapter was trained on; which of the images is not written down")
                break
    return None


def find_images(given: Sequence[str]) -> list[Path]:
    """Image files of files and folders, which are searched in depth."""
    from lion_fast.data.images import EXTENSIONS
    from lion_fast.data.sources import files_below

    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = [p for p in files_below(path) if p.suffix.lower() in EXTENSIONS]
            if not inside:
                raise DataError(f"{path} holds no image (image files end in {', '.join(EXTENSIONS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no file or folder {path}")
    return found


def sample_images(
    given: Sequence[str] | None, backbone: "Backbone", count: int
) -> tuple["torch.Tensor", str]:
    """At most so many of the images given, as the backbone takes them, or random ones; what they are."""
    import torch

    from lion_fast.data import read_image, transforms

    if given:
        paths, view = find_images(given)[:count], transforms(backbone)
        return torch.stack([view(read_image(path)) for path in paths]), f"{len(paths)} given images"
    images = torch.randn(count, 3, *sides(backbone.img_size), generator=torch.Generator().manual_seed(0))
    return images, f"{count} random-normal images (give --images for real ones)"
