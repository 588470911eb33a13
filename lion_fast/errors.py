"""The exceptions that lion_fast raises on bad input; each message says what to do."""

from collections.abc import Iterable


class LionError(Exception):
    """Base of every error raised on purpose by lion_fast."""


class OptionError(LionError, ValueError):
    """An option that does not exist, or a value outside its range."""


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
