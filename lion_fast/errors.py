"""The exceptions that lion_fast raises on bad input; each message says what to do."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

_Call = TypeVar("_Call", bound=Callable)


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


class ConvergenceError(LionError, RuntimeError):
    """An equilibrium that was not reached while `on_failure="raise"`."""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `OptionError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` is a number; a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise OptionError(f"{name} must be a number; got {value!r}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise `OptionError` unless `value` is a whole number of at least `least`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {value!r}")


def check_gamma(gamma: object) -> None:
    """Raise `OptionError` unless `gamma` is a bound under which the iteration contracts, in (0, 1)."""
    check_number("gamma", gamma)
    if not 0 < gamma < 1:
        raise OptionError(f"gamma must be in (0, 1) for a contraction; got {gamma!r}")


def names_options(call: _Call) -> _Call:
    """Decorate a call: an unknown keyword raises `UnknownOptionError`, which lists the valid ones."""
    parameters = inspect.signature(call).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    known = {p.name for p in parameters}

    @functools.wraps(call)
    def checked(*args, **options):
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UnknownOptionError(f"no option {', '.join(unknown)}; the options are {', '.join(valid)}")
        return call(*args, **options)

    return checked
