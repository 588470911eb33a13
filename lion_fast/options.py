"""Settings: dataclass fields with help and ranges, YAML values, KEY=VALUE, names that are not known."""

import errno
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lion_fast.errors import (
    OptionError,
    check_bool,
    check_choice,
    check_number,
    check_text,
    check_whole,
    one_line,
    refuse_unknown,
    shown,
)

# Choices that several rooms take.
# How images are brought to the backbone's size: short side and centre, or both sides.
RESIZE = ("crop", "direct")
CHECK = ("header", "decode", "none")
# The split of a run, image by image, in its output folder.
RECORD = "split.csv"
# Which images count as one that is there twice.
DUPLICATES = ("content", "near", "none")
# Of a class with fewer training images than `n_per_class`: an error, or all there are.
SCARCE = ("error", "all")
PRECISIONS = ("no", "bf16", "fp16")
GRANULARITIES = ("element", "unit", "block", "2:4")
CRITERIA = ("saliency", "magnitude", "random")
SCOPES = ("global", "layer", "matrix")
BLOCKS = (16, 32, 64)
# Of a file of settings, and of what is written in it: far above what anybody means, far below what hurts.
MOST_PIXELS = 2**14
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 2**18, 100_000, 30

_Class = TypeVar("_Class", bound=type)
_Options = TypeVar("_Options", bound="Options")


def sides(img_size: object) -> tuple[int, int]:
    """(height, width) of an image size, which is a side in pixels or (height, width); else `OptionError`.

    >>> sides(224), sides([32, 64])
    ((224, 224), (32, 64))
    """
    found = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size,) * 2
    if len(found) != 2 or any(type(n) is not int or not 1 <= n <= MOST_PIXELS for n in found):
        raise OptionError(
            f"img_size must be a side in pixels or (height, width), from 1 to {MOST_PIXELS} each; "
            f"got {shown(img_size)}"
        )
    return found


# -- settings as fields


def setting(default: Any, help: str, *, choices: Iterable = (), default_is: str | None = None, **range: Any):
    """A field of `Options`.

    help: what it does, for `--help` and the class' docstring. choices: values that it takes. default_is: what
    a default of None stands for. range: bounds of a number, as `check_number` and `check_whole` take them.
    """
    about = {"help": help, "choices": tuple(choices), "default_is": default_is, "range": range}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


def kind(option: Field) -> Any:
    """The type of an option's value, None apart."""
    return next((t for t in typing.get_args(option.type) if t is not types.NoneType), option.type)


def default_of(option: Field) -> str:
    """The default of an option in words."""
    return option.metadata["default_is"] or in_words(option.default)


def in_words(value: object) -> str:
    """A value as `--help` shows it."""
    words = {True: "yes", False: "no", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def help_of(option: Field, default: str | None = None) -> str:
    """Help of an option with its choices and default; `default`: another one, in words."""
    about, choices = option.metadata, ", ".join(map(str, option.metadata["choices"]))
    text = about["help"] + (f": {choices}" if choices else "")
    return text if kind(option) is dict else f"{text} [{default or default_of(option)}]"


def documented(cls: _Class) -> _Class:
    """Class decorator: the help of the fields as arguments in the docstring."""
    lines = [f"        {f.name}: {help_of(f)}" for f in fields(cls)]
    cls.__doc__ = "\n".join([cls.__doc__ or "", "    Args:", *lines])
    return cls


@dataclass(frozen=True)
class Options:
    """Base of settings: fields made by `setting`, checked by their types, choices and ranges.

    Raises `OptionError` for a value outside, with the range in the message.
    """

    def __post_init__(self) -> None:
        for option in fields(self):
            _check(option, getattr(self, option.name))

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings, in order."""
        return [option.name for option in fields(cls)]

    @classmethod
    def from_dict(cls: type[_Options], options: Mapping[str, Any]) -> _Options:
        """With these values; names that are not known are refused."""
        refuse_unknown(options, cls.names(), "option")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        return asdict(self)


def _check(option: Field, value: object) -> None:
    name, about, wanted = option.name, option.metadata, typing.get_args(option.type) or (option.type,)
    if value is None and types.NoneType in wanted:
        return
    if about["choices"]:
        check_choice(name, value, about["choices"])
    elif bool in wanted:
        check_bool(name, value)
    elif float in wanted:
        check_number(name, value, **about["range"])
    elif set(wanted) <= {int, types.NoneType}:
        check_whole(name, value, **about["range"])
    elif str in wanted:
        check_text(name, value)
    elif kind(option) is dict and not (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)):
        raise OptionError(f"{name} must be a mapping of names to values; got {shown(value)}")
    elif tuple in map(typing.get_origin, wanted):
        sides(value)


# -- what people write in files


def read_file(path: str | os.PathLike, most: int | None = None) -> bytes:
    """The bytes of a file, at most so many; `OSError` for what cannot be read to its end.

    A pipe or a device is none: reading could wait for ever.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        with open(path, "rb") as file:
            data = file.read(-1 if most is None else most + 1)
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, "no file can have this name", os.fspath(path)) from error
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))
    return data


def _bounded(value: Any, left: list[int], depth: int = 0) -> Any:
    """The value; `ValueError` where it is deeper, larger or in a number longer than anybody means.

    left: how many values it may still have; YAML's aliases make many of few.
    """
    left[0] -= 1
    if depth > MOST_DEPTH or left[0] < 0:
        raise ValueError(f"more than {MOST_DEPTH} levels or {MOST_VALUES:,} values")
    if isinstance(value, int) and value.bit_length() > 1024:
        raise ValueError("a number of more than 308 digits")
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(inner, (list, tuple, set)):
        for part in inner:
            _bounded(part, left, depth + 1)
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; `ValueError` where it is none, NaN, Infinity and a name twice included.

    >>> parse_json('{"a": [1, null]}')
    {'a': [1, None]}
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_number, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"more than {MOST_DEPTH} levels") from None
    return _bounded(value, [max(MOST_VALUES, len(text))])


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _number(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(name for name, _ in pairs)
    return dict(pairs)


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} stands there twice")
        seen.add(name)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2 and everywhere else, and a name stands once."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # merged from merged ones, they grow by powers
            raise ValueError(f"more than {MOST_VALUES:,} values")


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that looks like 1e-3 is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+\Z"), list("+-.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; `yaml.YAMLError` where it is none, a name twice in a mapping included.

    >>> parse_yaml("{lr: 1e-3, length: [5, 1E1], pool: cls}")
    {'lr': 0.001, 'length': [5, 10.0], 'pool': 'cls'}
    """
    try:
        return _bounded(yaml.load(text, _Loader), [MOST_VALUES])
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML raises many kinds on values that are not what their tags say
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


def dump_yaml(value: Mapping[str, Any]) -> str:
    """A mapping as `name: value` lines, in its order."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False)


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `OptionError` where it holds none, calling it `what`."""
    try:
        settings = parse_yaml(read_file(path, MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"the {what} {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise OptionError(f"the {what} {path} is not YAML: {one_line(error, 300)}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise OptionError(f"the {what} {path} must hold `name: value` lines")
    return settings


# -- KEY=VALUE


def key_values(given: Iterable[str], flag: str) -> dict[str, Any]:
    """The mapping that KEY=VALUE texts make; values are YAML, and "-" in a key is "_".

    >>> key_values(["length=20", "kv-length=1e1"], "--set")
    {'length': 20, 'kv_length': 10.0}
    """
    return dict(_pair(text, "{}", f"{flag} takes KEY=VALUE") for text in given)


def key_lists(given: Iterable[str], flag: str) -> dict[str, tuple]:
    """The mapping that KEY=V1,V2 texts make, each key once.

    >>> key_lists(["lr=1e-3,0.01", "pool=[cls],mean"], "--grid")
    {'lr': (0.001, 0.01), 'pool': (['cls'], 'mean')}
    """
    found: dict[str, tuple] = {}
    for text in given:
        key, values = _pair(text, "[{}]", f"{flag} takes KEY=V1,V2")
        if not values:
            raise OptionError(f"{flag} takes KEY=V1,V2; got {shown(text)}")
        if key in found:
            raise OptionError(f"{flag} names {key} twice; give all its values once, as {key}=V1,V2")
        found[key] = tuple(values)
    return found


def _pair(text: str, form: str, rule: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if equals and key.strip():
            return key.strip().replace("-", "_"), parse_yaml(form.format(value))
    except yaml.YAMLError:
        pass
    raise OptionError(f"{rule}; got {shown(text)}")
