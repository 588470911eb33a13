"""The exceptions that lion_fast raises on bad input; each message says what to do."""

import functools
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_Call = TypeVar("_Call", bound=Callable)
# The largest whole number that an option takes where none is named: sizes and counts lie far below.
LARGEST = 2**31 - 1


class LionError(Exception):
    """Base of every error raised on purpose by lion_fast."""


class OptionError(LionError, ValueError):
    """An option that does not exist, or a value outside its range."""


class UnknownOptionError(OptionError, TypeError):
    """An option that does not exist; a TypeError too, as Python raises for its own calls."""


class DataError(LionError, ValueError):
    """Images, labels or lists that cannot be used."""


class CheckpointError(LionError, RuntimeError):
    """A training checkpoint that is truncated, foreign or does not fit."""


class AdapterError(LionError, ValueError):
    """A saved adapter that does not fit the model it is loaded into."""


class BackboneError(LionError, ValueError):
    """A backbone that is not supported."""


class WeightsError(LionError, RuntimeError):
    """Backbone weights that cannot be found, fetched or verified."""


class WriteError(LionError, OSError):
    """A file that cannot be written: a full disk, a folder that is read-only or gone."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}. Free space, or choose another place"


class ConvergenceError(LionError, RuntimeError):
    """An equilibrium, or its gradient, that was not reached while `on_failure="raise"`."""


def one_line(text: object, most: int = 1000) -> str:
    r"""A text in one printable line of at most so many characters, shortened in its middle.

    >>> one_line("no file a\nb\x1b[2J"), one_line("ab" * 9, most=11)
    ('no file a b\\x1b[2J', 'aba ... bab')
    """
    line = " ".join(part.strip() for part in str(text).splitlines()).strip()
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    if len(line) <= most:
        return line
    kept = (most - 5) // 2
    return f"{line[:kept]} ... {line[-kept:]}"


def shown(value: object) -> str:
    """A value as an error shows it, at most 200 characters."""
    try:
        return one_line(repr(value), 200)
    except Exception as error:  # a number of too many digits, or a class of somebody else
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `OptionError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, (str, int, type(None))) or value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(str, choices))}; got {shown(value)}")


def check_text(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` is a text that can be a name or a path."""
    try:
        if isinstance(value, str) and b"\0" not in os.fsencode(value):
            return
    except UnicodeError:  # half a character
        pass
    raise OptionError(f"{name} must be a text that can be a name; got {shown(value)}")


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Raise `OptionError` unless `value` is an instance of one of these classes."""
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
        raise OptionError(f"{name} must be a {wanted}; got {shown(value)}")


def check_path(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` is a text or an `os.PathLike` that can be a path."""
    if not isinstance(value, os.PathLike):
        check_text(name, value)


def check_device(device: object) -> "torch.device":
    """The torch device of that name or number; `OptionError` where it cannot be used here."""
    import torch

    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()  # a meta tensor has no value
    except Exception as error:  # every kind of device has kinds of its own
        raise OptionError(f"device {shown(device)} cannot be used here: {one_line(error, 200)}") from error
    return found


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    note: str = "",
) -> None:
    """Raise `OptionError` unless `value` is a finite number within the bounds given; a bool is none.

    least, most: bounds that belong to the range. above, below: bounds that do not.
    note: what the number means or what to do, behind a comma in the message.

    >>> check_number("damping", 0, above=0, most=1)
    Traceback (most recent call last):
    lion_fast.errors.OptionError: damping must be a finite number above 0 and at most 1; got 0
    """
    bounds = [
        (word, bound, holds)
        for word, bound, holds in (
            ("at least", least, operator.ge),
            ("above", above, operator.gt),
            ("at most", most, operator.le),
            ("below", below, operator.lt),
        )
        if bound is not None
    ]
    largest = sys.float_info.max  # an int beyond it is no float
    finite = isinstance(value, Real) and not isinstance(value, bool) and -largest <= value <= largest
    if not finite or not all(holds(value, bound) for _, bound, holds in bounds):
        wanted = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds)
        raise OptionError(
            f"{name} must be a finite number{wanted and f' {wanted}'}{note and f', {note}'}; "
            f"got {shown(value)}"
        )


def check_whole(name: str, value: object, least: int = 1, most: int = LARGEST) -> None:
    """Raise `OptionError` unless `value` is a whole number from `least` to `most`; a bool is none.

    >>> check_whole("length", 0)
    Traceback (most recent call last):
    lion_fast.errors.OptionError: length must be a whole number of at least 1; got 0
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        near = most == LARGEST and not (whole and value > most)
        wanted = f"of at least {least}" if near else f"from {least} to {most}"
        raise OptionError(f"{name} must be a whole number {wanted}; got {shown(value)}")


def check_seed(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` can seed every generator of torch."""
    check_whole(name, value, -(2**63), 2**64 - 1)


def check_bool(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be true or false; got {shown(value)}")


def check_gamma(gamma: object) -> None:
    """Raise `OptionError` unless `gamma` is a bound under which the iteration contracts, in (0, 1)."""
    check_number("gamma", gamma, above=0, below=1, note="where the iteration contracts")


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `UnknownOptionError` naming what is not known, the nearest valid name, and all of them."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UnknownOptionError(f"unknown {what} {shown(name)}{hint} Valid: {', '.join(known)}")


def names_options(call: _Call) -> _Call:
    """Decorate a call: a keyword that it does not have is refused, see `refuse_unknown`."""
    parameters = inspect.signature(call).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    known = {p.name for p in parameters}

    @functools.wraps(call)
    def checked(*args, **options):
        refuse_unknown((name for name in options if name not in known), valid, "option")
        return call(*args, **options)

    return checked
