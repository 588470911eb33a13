"""Settings in YAML files, with values as everybody means them."""

import re
from pathlib import Path
from typing import Any

from lion_fast.errors import OptionError

# How images are brought to the backbone's size: short side and centre, or both sides.
RESIZE = ("crop", "direct")


def sides(img_size: object) -> tuple[int, int]:
    """(height, width) of an image size, which is a side in pixels or (height, width); else `OptionError`.

    >>> sides(224), sides([32, 64])
    ((224, 224), (32, 64))
    """
    found = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size,) * 2
    if len(found) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in found):
        raise OptionError(
            f"img_size must be a side in pixels or (height, width), at least 1 each; got {img_size!r}"
        )
    return found


def read_settings(path: Path, what: str) -> dict:
    """The mapping that a YAML file holds; `OptionError` where it holds none, calling it `what`."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"the {what} {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise OptionError(f"the {what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise OptionError(f"the {what} {path} must hold `name: value` lines")
    return numbers(settings)


def numbers(value: object) -> Any:
    """With texts such as 1e-3, which YAML does not take for numbers, as numbers; in lists and mappings too.

    >>> numbers({"lr": "1e-3", "length": [5, "1E1"], "pool": "cls"})
    {'lr': 0.001, 'length': [5, 10.0], 'pool': 'cls'}
    """
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value
