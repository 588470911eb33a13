"""Values that YAML read, as everybody means them."""

import re
from typing import Any


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
